"""Traces and length tables as files: which format it is shows in the first line.

    .jsonl            Mooncake: timestamp (ms), input_length, output_length, hash_ids
    .csv with times   Azure (TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT (Timestamp,
                      Request tokens, Response tokens), or timestamp_s, input_length, output_length
    .csv without      input_length, output_length: lengths alone

gzip or plain. Requests of tables share no prefix. A line that is no request is refused with its
number (`trace_lines.py`). Does not know: what is simulated with them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from baton.core.errors import ConfigError
from baton.simulator.arrivals import RequestLengths, unshared_chain
from baton.simulator.trace_lines import LineCheck, opened_trace, seconds_of, tokens_of
from baton.simulator.workload import MOONCAKE_BLOCK_SIZE, Arrival, read_mooncake

_TIMES = ("timestamp", "timestamp_s")
_INPUTS = ("contexttokens", "request tokens", "input_length")
MAX_TOLD_COLUMNS = 10
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
        arrivals = read_mooncake(path, limit=limit)
        _check_not_empty(path, arrivals)
        return Trace(path.name, tuple(arrivals), (), MOONCAKE_BLOCK_SIZE)
    rows = list(_rows(path, limit))
    _check_not_empty(path, rows)
    if rows[0].at_s is None:
        return Trace(path.name, (), tuple(row.lengths for row in rows), block_size)
    start_s = rows[0].at_s
    arrivals = [
        Arrival(
            number,
            (row.at_s or 0.0) - start_s,
            row.lengths.num_prompt_tokens,
            row.lengths.num_output_tokens,
            unshared_chain(f"{path.name}.{number}", row.lengths.num_prompt_tokens // block_size),
        )
        for number, row in enumerate(rows)
    ]
    return Trace(path.name, tuple(arrivals), (), block_size)


@dataclass(frozen=True, slots=True)
class _Row:
    at_s: float | None
    lengths: RequestLengths


def _rows(path: Path, limit: int | None) -> Iterator[_Row]:
    check = LineCheck(path)
    with opened_trace(path) as file:
        reader = csv.DictReader(file)
        names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
        time = next((names[n] for n in _TIMES if n in names), None)
        prompt = next((names[n] for n in _INPUTS if n in names), None)
        output = next((names[n] for n in _OUTPUTS if n in names), None)
        if prompt is None or output is None:
            raise ConfigError(
                f"{path.name}: no columns of lengths among {_told(names)}; needed: one of "
                f"{', '.join(_INPUTS)} and one of {', '.join(_OUTPUTS)}"
            )
        for number, row in enumerate(reader):
            if number == limit:
                return
            try:
                read = _row(row, time, prompt, output)
            except ValueError as error:
                raise check.refused(reader.line_num, error) from None
            if read.at_s is not None:
                check.ordered(read.at_s, reader.line_num)
            yield read


def _row(row: Mapping[str, str], time: str | None, prompt: str, output: str) -> _Row:
    lengths = RequestLengths(tokens_of(row[prompt], prompt), tokens_of(row[output], output))
    return _Row(None if time is None else _seconds(row[time], time), lengths)


def _seconds(text: str | None, name: str) -> float:
    """A number of seconds, or a date and time."""
    if text is None or text[:8].count("-") < 2:
        return seconds_of(text, name)
    # Fractions of 100 ns are more than Python's microseconds.
    head, _, fraction = text.strip().partition(".")
    moment = datetime.fromisoformat(head)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    digits = fraction.rstrip("Z")
    return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)


def _check_not_empty(path: Path, rows: object) -> None:
    if not rows:
        raise ConfigError(f"{path.name} has no requests: a trace has one in each line")


def _told(names: Iterable[str]) -> str:
    """A file of something else may have any number of columns of any length."""
    told = [f"{name!r:.40}" for name in islice(names, MAX_TOLD_COLUMNS)]
    return ", ".join(told) or "none"
