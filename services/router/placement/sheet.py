"""What the candidates of one pool would cost for one request: totals of all of them as arrays, and
what those of one are made of.

May be kept for as long as somebody wants to read of it, so of the pool it has the workers alone.

Does not know: how the totals came about, which worker was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from services.router.placement.candidates import BATCH_ROW, QUEUED_ROW, RESIDENT_ROW, WorkerRow
from services.router.placement.placement import PlacementRequest
from services.router.placement.prefix_source import Ways
from services.router.placement.speeds import Floats, Speeds

NOTHING: Floats = np.empty(0)


class Savings(NamedTuple):
    """What the ways to a prefix save of computing it, less what moving it takes. Seconds."""

    by_way: list[Floats]
    best_s: Floats
    """Of the cheapest way, which saves most."""


@dataclass(slots=True, eq=False)
class Sheet:
    """Arrays over candidates, but for those of decode terms: over `generators`."""

    members: tuple[WorkerRow, ...]
    """Of the pool, in its order."""
    num_prefill: int
    request: PlacementRequest
    loads: Floats
    """[cost row, candidate]"""
    load_s: Floats
    """[timed cost row, candidate]: what this load takes; the first is the wait in the queue."""
    speeds: Speeds
    whole_s: Floats
    """Computing all of the prompt."""
    work_s: Floats
    """Move, compute and the credit that is lost to the queue."""
    prefill_cost: Floats
    ways: Ways | None
    """None when no block of the prompt is cached anywhere."""
    savings: Savings | None
    """None without ways."""
    generators: slice = field(init=False)
    """Candidates whose decode terms are there."""
    grown_tokens: float = field(init=False)
    """KV of the request halfway through its output."""
    decode_cost: Floats = field(init=False)
    missing: Floats = field(init=False)
    """Tokens of KV there are no blocks for; empty where nobody lacks any."""
    local_cost: Floats = field(init=False)
    """Infinite where a local prefill is not allowed; empty where it is nowhere."""

    @property
    def block_size(self) -> int:
        return self.members[0].info.layout.block_size

    def compute_s(self) -> Floats:
        """Of what is not cached, on the cheapest way."""
        cached = self.cached()
        return self.whole_s if cached is None else self.whole_s - self.speeds.saved_s(cached)

    def cached(self) -> Floats | None:
        """Blocks that need not be computed, on the cheapest way; None: none anywhere."""
        if self.ways is None or self.savings is None:
            return None
        cached = self.ways.ways[-1].blocks
        # Of equal ways the first.
        for way, saved_s in zip(self.ways.ways[-2::-1], self.savings.by_way[-2::-1], strict=True):
            cached = np.where(saved_s == self.savings.best_s, way.blocks, cached)
        return cached

    def itl_s(self) -> Floats:
        """Between tokens in the batch of each of `generators`, with the request in it."""
        itl_s: Floats = np.array((1.0, 1.0, self.grown_tokens)).dot(self.speeds.step)
        itl_s += self.load_s[BATCH_ROW]
        itl_s += self.load_s[RESIDENT_ROW]
        return itl_s[self.generators]

    def on_device(self, workers: slice) -> Floats:
        """Blocks of the prompt in the pools of `workers`; empty without ways."""
        return NOTHING if self.ways is None else self.ways.ways[0].blocks[workers]

    # Of one candidate.

    def queue_s_of(self, i: int) -> float:
        return self.load_s.item(QUEUED_ROW, i)

    def prefill_s_of(self, i: int) -> float:
        """Move and compute."""
        whole_s: float = self.whole_s.item(i)
        return whole_s if self.savings is None else whole_s - self.savings.best_s.item(i)

    def cached_of(self, i: int) -> float:
        """Blocks, on the cheapest way."""
        return 0.0 if self.ways is None else self.ways.ways[self.way_of(i)].blocks.item(i)

    def itl_s_of(self, i: int) -> float:
        fixed_s, sequence_s, kv_token_s = self.speeds.step[:, i].tolist()
        itl_s: float = fixed_s + sequence_s + kv_token_s * self.grown_tokens
        return itl_s + self.load_s.item(BATCH_ROW, i) + self.load_s.item(RESIDENT_ROW, i)

    def missing_of(self, i: int) -> float:
        return self.missing.item(i - self.generators.start) if self.missing.size else 0.0

    def way_of(self, i: int) -> int:
        """Its cheapest one, by number in `ways`."""
        assert self.savings is not None
        saved_s = [of_way.item(i) for of_way in self.savings.by_way]
        return saved_s.index(max(saved_s))
