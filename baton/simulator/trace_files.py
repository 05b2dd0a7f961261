"""Traces and length tables as files: which format it is shows in the first line.

    .jsonl            Mooncake: timestamp (ms), input_length, output_length, hash_ids
    .csv with times   Azure (TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT (Timestamp,
                      Request tokens, Response tokens), or timestamp_s, input_length, output_length
    .csv without      input_length, output_length: lengths alone

gzip or plain. Requests of tables share no prefix. Does not know: what is simulated with them.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from baton.core.errors import ConfigError
from baton.simulator.arrivals import RequestLengths, unshared_chain
from baton.simulator.workload import MOONCAKE_BLOCK_SIZE, Arrival, read_mooncake

_TIMES = ("timestamp", "timestamp_s")
_INPUTS = ("contexttokens", "request tokens", "input_length")
_OUTPUTS = ("generatedtokens", "response tokens", "output_length")


@dataclass(frozen=True, slots=True)
class Trace:
    """Exactly one of `arrivals` and `lengths` is not empty."""

    name: str
    arrivals: tuple[Arrival, ...]
    lengths: tuple[RequestLengths, ...]
    block_size: int


def read_trace(path: Path, *, block_size: int, limit: int | None = None) -> Trace:
    """`block_size`: of the KV blocks, where the file does not fix it as Mooncake's does.

    Raises ConfigError naming the file, and the line or the columns that are wrong.
    """
    if ".jsonl" in path.suffixes:
        try:
            arrivals = read_mooncake(path, limit=limit)
        except OSError as error:
            raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from None
        _check_not_empty(path, arrivals)
        return Trace(path.name, tuple(arrivals), (), MOONCAKE_BLOCK_SIZE)
    rows = list(_rows(path, limit))
    _check_not_empty(path, rows)
    if rows[0].at_s is None:
        return Trace(path.name, (), tuple(row.lengths for row in rows), block_size)
    start_s = min(row.at_s or 0.0 for row in rows)
    ordered = sorted(rows, key=lambda row: row.at_s or 0.0)
    arrivals = [
        Arrival(
            number,
            (row.at_s or 0.0) - start_s,
            row.lengths.num_prompt_tokens,
            row.lengths.num_output_tokens,
            unshared_chain(f"{path.name}.{number}", row.lengths.num_prompt_tokens // block_size),
        )
        for number, row in enumerate(ordered)
    ]
    return Trace(path.name, tuple(arrivals), (), block_size)


@dataclass(frozen=True, slots=True)
class _Row:
    at_s: float | None
    lengths: RequestLengths


def _rows(path: Path, limit: int | None) -> Iterator[_Row]:
    with _opened(path) as file:
        reader = csv.DictReader(file)
        names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        time = next((names[n] for n in _TIMES if n in names), None)
        prompt = next((names[n] for n in _INPUTS if n in names), None)
        output = next((names[n] for n in _OUTPUTS if n in names), None)
        if prompt is None or output is None:
            raise ConfigError(
                f"{path.name}: no columns of lengths among {sorted(names)}; needed: one of "
                f"{', '.join(_INPUTS)} and one of {', '.join(_OUTPUTS)}"
            )
        for number, row in enumerate(reader):
            if number == limit:
                return
            try:
                yield _row(row, time, prompt, output)
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{path.name} line {number + 2} is not a request: {error}"
                ) from None


def _row(row: Mapping[str, str], time: str | None, prompt: str, output: str) -> _Row:
    # Traces hold requests that failed or were empty; one token stands for them.
    lengths = RequestLengths(max(1, int(float(row[prompt]))), max(1, int(float(row[output]))))
    return _Row(None if time is None else _seconds(row[time]), lengths)


def _seconds(text: str) -> float:
    """A number of seconds, or a date and time."""
    try:
        return float(text)
    except ValueError:
        # Fractions of 100 ns are more than Python's microseconds.
        head, _, fraction = text.strip().partition(".")
        moment = datetime.fromisoformat(head)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        digits = fraction.rstrip("Z")
        return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            yield file
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not a text file") from None


def _check_not_empty(path: Path, rows: object) -> None:
    if not rows:
        raise ConfigError(f"{path.name} has no requests")
