"""What will have left the decode batches by the time a prompt is computed. Pure.

A request admitted now joins its decode batch one prefill later. Judging it by the batch of today
makes admission swing: it refuses for sequences that will be gone, admits for a batch that is about
to grow. Sequences still to join are in the workers' load already (as reservations and unreported
submits); those that will have ended are foretold here, from what this router has placed.

Does not know: time, what decoding costs.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import NamedTuple

from baton.core.worker_info import WorkerId


class Ending(NamedTuple):
    """Sequences and the tokens of KV they will hold at their end."""

    num_sequences: int
    kv_tokens: int


class Running(NamedTuple):
    """One sequence."""

    ends_at_s: float
    number: int
    kv_tokens: int


class DecodeForecast:
    """Ends of running sequences by worker; `add` returns what `remove` takes."""

    def __init__(self) -> None:
        self._by_worker: dict[WorkerId, list[Running]] = {}
        self._num_added = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_worker.values()))

    def add(self, worker_id: WorkerId, *, ends_at_s: float, kv_tokens: int) -> Running:
        self._num_added += 1
        running = Running(ends_at_s, self._num_added, kv_tokens)
        insort(self._by_worker.setdefault(worker_id, []), running)
        return running

    def remove(self, worker_id: WorkerId, running: Running) -> None:
        """It has ended; once for each `add`."""
        others = self._by_worker[worker_id]
        index = bisect_right(others, running) - 1
        assert others[index] is running
        del others[index]
        if not others:
            del self._by_worker[worker_id]

    def ending(self, worker_id: WorkerId, now_s: float, until_s: float) -> Ending:
        """Sequences of the worker that should end in that time. Those that have outlived what was
        expected of them are not counted: nobody knows when they end."""
        running = self._by_worker.get(worker_id, [])
        first = bisect_right(running, now_s, key=lambda r: r.ends_at_s)
        last = bisect_right(running, until_s, key=lambda r: r.ends_at_s)
        return Ending(max(0, last - first), sum(r.kv_tokens for r in running[first:last]))
