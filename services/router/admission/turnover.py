"""What will have left the decode batches, and how soon places in them come free. Pure.

A request admitted now joins its decode batch one prefill later. Judging it by the batch of today
makes admission swing: it refuses for sequences that will be gone, admits for a batch that is about
to grow. Sequences still to join are in the workers' load already (as reservations and unreported
submits); those that will have ended are foretold here, from what this router has placed.

Nobody knows when a sequence ends, so these are expectations: by how long outputs have been that
ended by themselves (`output_lengths`), and for certain where the client's own bound is.

Does not know: what decoding costs, clocks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection
from typing import NamedTuple, Protocol

import numpy as np

from baton.core.worker_info import WorkerId
from services.router.admission.output_lengths import OutputLengths

FRESH_S = 0.05
"""Expectations are worked out anew after this long, and"""
FRESH_S_PER_SEQUENCE = 5e-5
"""so much longer for each sequence, so that many of them cost no more time than few."""


class Sequence(Protocol):
    """One request on its decode worker, as far as the router has heard."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...
    @property
    def max_output_tokens(self) -> int: ...


class Ending(NamedTuple):
    """Expected numbers: of sequences, and of the tokens of KV they hold."""

    num_sequences: float
    kv_tokens: float


NOTHING = Ending(0.0, 0.0)


class _Outlook(NamedTuple):
    """Of one worker: its sequences that have tokens. Means, so that a look takes microseconds."""

    left: list[float]
    """Steps to the client's bound, sorted."""
    hazard: float
    """Chance to end by itself at a step."""
    kv_tokens: float


class Turnover:
    """Of one model; follows sequences from `add` to `remove`."""

    def __init__(self, expected_output_tokens: float) -> None:
        self._lengths = OutputLengths(expected_output_tokens)
        self._by_worker: dict[WorkerId, dict[Sequence, None]] = {}
        self._outlooks: dict[WorkerId, _Outlook] = {}
        self._fresh_until_s = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._by_worker.values()))

    @property
    def workers(self) -> Collection[WorkerId]:
        """Those with sequences; not a copy."""
        return self._by_worker.keys()

    def add(self, worker_id: WorkerId, sequence: Sequence) -> None:
        self._by_worker.setdefault(worker_id, {})[sequence] = None

    def remove(self, worker_id: WorkerId, sequence: Sequence) -> None:
        """It has ended, for whatever reason; once for each `add`."""
        running = self._by_worker[worker_id]
        del running[sequence]
        if not running:
            del self._by_worker[worker_id]
        num_tokens = sequence.num_output_tokens
        if num_tokens:
            is_bound = num_tokens >= sequence.max_output_tokens
            self._lengths.ended(num_tokens, is_bound=is_bound)

    def ending(self, worker_id: WorkerId, num_steps: float, now_s: float) -> Ending:
        """Sequences of the worker expected to end within so many of its decode steps."""
        self._refresh(now_s)
        outlook = self._outlooks.get(worker_id)
        if outlook is None:
            return NOTHING
        num_bound = bisect_right(outlook.left, num_steps)
        num_others = len(outlook.left) - num_bound
        num_ends = num_bound - num_others * math.expm1(-num_steps * outlook.hazard)
        return Ending(num_ends, num_ends * outlook.kv_tokens)

    def _refresh(self, now_s: float) -> None:
        if now_s < self._fresh_until_s:
            return
        self._fresh_until_s = now_s + FRESH_S + FRESH_S_PER_SEQUENCE * len(self)
        rows = [
            (sequence.num_output_tokens, sequence.max_output_tokens, sequence.num_prompt_tokens)
            for running in self._by_worker.values()
            for sequence in running
        ]
        ages, bounds, prompts = np.array(rows, float).reshape(-1, 3).T
        hazards = self._lengths.hazards(ages)
        self._outlooks, start = {}, 0
        for worker_id, running in self._by_worker.items():
            own = slice(start, start + len(running))
            start += len(running)
            # Without a token it is still to join.
            joined = ages[own] > 0
            if not joined.any():
                continue
            left = np.sort((bounds[own] - ages[own])[joined]).tolist()
            kv_tokens = (prompts[own] + ages[own])[joined].mean()
            hazard = hazards[own][joined].mean()
            self._outlooks[worker_id] = _Outlook(left, float(hazard), float(kv_tokens))
