"""What arrives: requests as lengths and block identities, without text.

A trace names the blocks of each prompt: equal names at equal positions are equal prefixes. That is
all a prefix cache looks at, so token ids are made up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.core.block import BlockHash, next_hash, root_hash
from baton.core.errors import ConfigError
from baton.simulator.trace_lines import LineCheck, opened_trace, seconds_of, tokens_of
from services.router.admission.slo import NO_TARGETS, SloTargets

MOONCAKE_BLOCK_SIZE = 512
"""Tokens of one block of the published Mooncake traces."""
MAX_HASH_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. Times in seconds from the start of the workload."""

    number: int
    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_hashes: tuple[BlockHash, ...]
    """Of the prompt's full blocks."""
    session_key: str = ""
    tenant: str = ""
    targets: SloTargets = NO_TARGETS
    max_output_tokens: int = 0
    """What its client has said it takes at most; 0: exactly as many as come."""


def read_mooncake(path: Path, *, limit: int | None = None, speed: float = 1.0) -> list[Arrival]:
    """Requests of a Mooncake trace (JSON lines, gzip or plain), in order of arrival.

    `speed` above 1 lets them arrive faster. The published times come in bursts a few seconds apart,
    an artefact of recording: requests of one burst are spread evenly until the next one. Raises
    ConfigError naming the line that is not of the format.
    """
    if speed <= 0:
        raise ConfigError(f"speed must be above 0, got {speed:g}")
    rows = list(_rows(path, limit))
    hasher = _Hasher()
    return [
        Arrival(i, at_s / speed, row[0], row[1], hasher.chain(row[2], row[0]))
        for i, (at_s, row) in enumerate(zip(_spread([r[3] for r in rows]), rows, strict=True))
    ]


_Row = tuple[int, int, list[int], float]


def _rows(path: Path, limit: int | None) -> Iterator[_Row]:
    check = LineCheck(path)
    with opened_trace(path) as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and number > limit:
                return
            try:
                row = _row(line)
            except (ValueError, RecursionError) as error:
                fields = "timestamp, input_length, output_length and hash_ids"
                raise check.refused(
                    number, error, f"a line of a Mooncake trace has {fields}"
                ) from None
            check.ordered(row[3], number)
            yield row


def _row(line: str) -> _Row:
    """Raises ValueError saying what is wrong."""
    if not line.strip():
        raise ValueError("it is empty")
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"it is no object but {line.strip()!r:.60}")
    names = row.get("hash_ids")
    if not isinstance(names, list) or not all(type(name) is int for name in names):
        raise ValueError("hash_ids must be a list of whole numbers")
    if names and not 0 <= min(names) <= max(names) <= MAX_HASH_ID:
        raise ValueError(f"hash_ids must be from 0 to {MAX_HASH_ID}")
    return (
        tokens_of(row.get("input_length"), "input_length"),
        tokens_of(row.get("output_length"), "output_length"),
        names,
        seconds_of(row.get("timestamp"), "timestamp") / 1000,
    )


def _spread(times_s: list[float]) -> list[float]:
    """Requests of equal time, evenly over the gap to the next time."""
    spread: list[float] = []
    start = 0
    while start < len(times_s):
        end = start
        while end < len(times_s) and times_s[end] == times_s[start]:
            end += 1
        gap_s = times_s[end] - times_s[start] if end < len(times_s) else 1.0
        spread += (times_s[start] + gap_s * i / (end - start) for i in range(end - start))
        start = end
    return spread


class _Hasher:
    """Chains of block names; each name at its place is hashed once."""

    def __init__(self) -> None:
        self._root = root_hash("simulated")
        self._known: dict[tuple[BlockHash, int], BlockHash] = {}

    def chain(self, names: Iterable[int], num_tokens: int) -> tuple[BlockHash, ...]:
        parent, chain = self._root, []
        for name in list(names)[: num_tokens // MOONCAKE_BLOCK_SIZE]:
            key = (parent, name)
            parent = self._known.get(key) or self._known.setdefault(key, next_hash(parent, [name]))
            chain.append(parent)
        return tuple(chain)
