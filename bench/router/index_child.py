"""One index under the workload, in a process of its own so that its memory can be told apart.

    python bench/router/index_child.py '{"contender": "baton" | "dynamo", "workload": {...}}'

Prints one JSON object. Runs under the peer's own Python, so only the standard library is needed
until the contender is loaded. Events and prompts are made before the clock runs; each contender
gets them in the form in which it takes them over the wire.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.router.index_workload import (
    EXPECTED_BLOCKS,
    EXPECTED_WORKERS,
    HASH_BYTES,
    PROMPTS,
    Workload,
    percentile,
    split,
)

CHUNK_EVENTS = 200
"""Made and applied in turn, so that what the events themselves take is small."""
NUM_PROMPTS = 1000
PROMPTS_AT_ONCE = 100


class Index(Protocol):
    def event(self, worker: int, parent: bytes, joined: bytes) -> Any: ...
    def apply(self, event: Any) -> None: ...
    def flush(self) -> None: ...
    def prompt(self, hashes: list[bytes]) -> Any: ...
    def match(self, prompt: Any) -> Any: ...
    def lengths(self, found: Any) -> dict[int, int]: ...
    def remove_worker(self, worker: int) -> None: ...


class Baton:
    """The prefix index, fed as the router feeds it."""

    def __init__(self, workload: Workload) -> None:
        from services.router.index.prefix_index import PrefixIndex

        self._index = PrefixIndex(workload.num_distinct, max_pending=1024)
        self._names = [f"worker-{number}" for number in range(workload.num_workers)]
        for name in self._names:
            self._index.slot_of(name)

    def event(self, worker: int, parent: bytes, joined: bytes) -> tuple[str, bytes]:
        return self._names[worker], joined

    def apply(self, event: tuple[str, bytes]) -> None:
        self._index.store(*event)

    def flush(self) -> None:
        self._index.flush()

    def prompt(self, hashes: list[bytes]) -> tuple[bytes, ...]:
        return tuple(hashes)

    def match(self, prompt: Any) -> Any:
        return self._index.match(prompt)

    def lengths(self, found: Any) -> dict[int, int]:
        return {self._names.index(w): n for w, n in found.by_worker().items()}

    def remove_worker(self, worker: int) -> None:
        self._index.remove_worker(self._names[worker])
        self._index.flush()


class Dynamo:
    """`dynamo._core.RadixTree`: 64-bit hashes, events as JSON."""

    def __init__(self, workload: Workload) -> None:
        from dynamo._core import RadixTree

        self._tree = RadixTree()
        self._number = 0

    def event(self, worker: int, parent: bytes, joined: bytes) -> tuple[int, bytes]:
        self._number += 1
        blocks = [{"block_hash": h, "tokens_hash": h} for h in _numbers(split(joined))]
        parent_hash = _numbers([parent])[0] if parent else None
        data = {"stored": {"parent_hash": parent_hash, "blocks": blocks}}
        event = {"event_id": self._number, "data": data, "dp_rank": 0}
        return worker, json.dumps(event).encode()

    def apply(self, event: tuple[int, bytes]) -> None:
        self._tree.apply_event(*event)

    def flush(self) -> None:
        # Events are worked off in order by a thread; an answer means that they were.
        self._tree.find_matches([1])

    def prompt(self, hashes: list[bytes]) -> list[int]:
        return _numbers(hashes)

    def match(self, prompt: Any) -> Any:
        return self._tree.find_matches(prompt).scores

    def lengths(self, found: Any) -> dict[int, int]:
        return {worker: blocks for (worker, _), blocks in found.items()}

    def remove_worker(self, worker: int) -> None:
        self._tree.remove_worker(worker)
        self.flush()


def _numbers(hashes: list[bytes]) -> list[int]:
    return [int.from_bytes(h[:8], "little") for h in hashes]


def measure(make: Callable[[Workload], Index], workload: Workload) -> dict[str, float]:
    small = replace(workload, num_entries=10_000)
    # What is loaded and started once is not memory of the entries.
    _insert(make(small), small, rss_bytes())
    before = rss_bytes()
    index = make(workload)
    result = _insert(index, workload, before)
    for kind in PROMPTS:
        times_us, found = _match(index, workload, kind)
        lengths = index.lengths(found)
        assert max(lengths.values(), default=0) == EXPECTED_BLOCKS[kind], (kind, lengths)
        assert len(lengths) == EXPECTED_WORKERS[kind], (kind, lengths)
        result[f"match_{kind}_p50_us"] = percentile(times_us, 0.5)
        result[f"match_{kind}_p99_us"] = percentile(times_us, 0.99)
    start = time.perf_counter()
    index.remove_worker(3)
    result["remove_worker_ms"] = (time.perf_counter() - start) * 1e3
    return result


def _insert(index: Index, workload: Workload, before: int) -> dict[str, float]:
    wall_s = cpu_s = 0.0
    events = workload.events()
    while True:
        ready = [index.event(*event) for event in islice(events, CHUNK_EVENTS)]
        if not ready:
            break
        wall, cpu = time.perf_counter(), time.process_time()
        for event in ready:
            index.apply(event)
        index.flush()
        wall_s += time.perf_counter() - wall
        cpu_s += time.process_time() - cpu
    grown = rss_bytes() - before
    return {
        "insert_blocks_per_s": workload.num_stored / wall_s,
        "insert_blocks_per_cpu_s": workload.num_stored / cpu_s,
        "bytes_per_block": grown / workload.num_distinct,
        "bytes_per_block_and_worker": grown / (workload.num_distinct * workload.num_holders),
    }


def _match(index: Index, workload: Workload, kind: str) -> tuple[list[float], Any]:
    times_us: list[float] = []
    found: Any = None
    prompts = workload.prompts(kind, NUM_PROMPTS)
    for _ in range(NUM_PROMPTS // PROMPTS_AT_ONCE):
        ready = [index.prompt(split(next(prompts))) for _ in range(PROMPTS_AT_ONCE)]
        for prompt in ready:
            start = time.perf_counter()
            found = index.match(prompt)
            times_us.append((time.perf_counter() - start) * 1e6)
    return times_us, found


def rss_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    order = json.loads(sys.argv[1])
    workload = Workload(**order["workload"])
    assert len(workload.chain(0)) == HASH_BYTES * workload.chain_blocks
    contender: Callable[[Workload], Index] = {"baton": Baton, "dynamo": Dynamo}[order["contender"]]
    print(json.dumps(measure(contender, workload)))


if __name__ == "__main__":
    main()
