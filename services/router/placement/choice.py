"""The last step of a placement: from costs to workers, with what is said of them.

Does not know: how the costs came about.
"""

from __future__ import annotations

import random

import numpy as np

from services.router.placement.candidates import Floats
from services.router.placement.load_book import SEQUENCES
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement, PlacementKind, Prediction
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.prefix_source import offer_for
from services.router.placement.score_terms import LazyTerms
from services.router.placement.scoring import Sheet

TIE_S = 1e-6
"""Costs this close are equal."""


class Noise:
    """Draws of the Gumbel distribution: the lowest of costs less such draws is a soft-max choice.

    Drawn once, and read from a random place each time.
    """

    SIZE = 16_381

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        source = np.random.default_rng(rng.getrandbits(64))
        self._ring = np.tile(source.gumbel(size=self.SIZE), 2)
        self._ties = self._ring * TIE_S

    def draws(self, num: int) -> Floats:
        """`num` draws, not to be written to."""
        start = int(self._rng.random() * self.SIZE)
        return self._ring[start : start + num]

    def ties(self, num: int) -> Floats:
        """Draws so small that they tell equal costs apart and no others."""
        start = int(self._rng.random() * self.SIZE)
        return self._ties[start : start + num]


class Choice:
    """The last step: from costs to one placement."""

    __slots__ = ("_config", "_noise", "_perf", "_sheet")

    def __init__(self, sheet: Sheet, config: PolicyConfig, perf: PerfModel, noise: Noise) -> None:
        self._sheet, self._config, self._perf, self._noise = sheet, config, perf, noise

    def alone(self, workers: slice, reason: str) -> Placement:
        """All on one of `workers`, which are those with decode terms."""
        cost = self._sheet.prefill_cost[workers] + self._sheet.decode_cost
        at = int(self._less_noise(cost).argmin())
        return self._placement(workers.start + at, None, cost.item(at), 0.0, reason)

    def best(self, handoff_s: Floats, is_local_possible: bool) -> Placement:
        """A pair, or all on one decode worker where that costs less."""
        sheet = self._sheet
        num_prefill, num_decode = handoff_s.shape
        prefill_cost = sheet.prefill_cost[:num_prefill]
        total = handoff_s + self._less_noise(prefill_cost)[:, None]
        total += self._less_noise(sheet.decode_cost)
        p, d = divmod(int(total.argmin()), num_decode)
        moved_s = handoff_s.item(p, d)
        score = prefill_cost.item(p) + sheet.decode_cost.item(d) + moved_s
        if is_local_possible:
            at = int(self._less_noise(sheet.local_cost).argmin())
            local = sheet.local_cost.item(at)
            if local < score:
                reason = "cheaper than a hand-off"
                return self._placement(num_prefill + at, None, local, 0.0, reason)
        return self._placement(p, num_prefill + d, score, moved_s, "lowest cost")

    def _less_noise(self, cost: Floats) -> Floats:
        """The lowest of these is drawn by a soft-max, or among equal ones."""
        less = cost - self._noise.ties(len(cost))
        if self._config.temperature:
            spread = self._config.temperature * abs(float(cost.min()))
            less -= self._noise.draws(len(cost)) * spread
        return less

    def _placement(
        self, computes: int, decodes: int | None, score: float, moved_s: float, reason: str
    ) -> Placement:
        """`computes`: position of the worker that computes the prompt; `decodes`: of the other."""
        sheet = self._sheet
        pool = sheet.pool
        is_prefill = computes < pool.num_prefill
        generates = computes if decodes is None else decodes
        at = generates - sheet.generators.start
        kind = PlacementKind.LOCAL_PREFILL
        if decodes is not None:
            kind = PlacementKind.REMOTE_PREFILL
        elif is_prefill:
            kind = PlacementKind.PREFILL_ONLY
        queue_s = sheet.queue_s.item(computes)
        work_s = sheet.move_s.item(computes) + sheet.compute_s.item(computes)
        offer = None
        if sheet.ways is not None and sheet.way is not None:
            way = sheet.way.item(computes) // pool.num_candidates
            offer = offer_for(sheet.ways, pool, computes, way, self._config.min_offer_blocks)
        is_short = sheet.missing.item(at) > 0
        return Placement(
            kind,
            pool.worker_id(computes) if is_prefill else None,
            None if is_prefill and decodes is None else pool.worker_id(generates),
            score,
            reason,
            LazyTerms(sheet, computes, decodes),
            offer=offer,
            predicted=Prediction(
                queue_s + work_s + self._perf.overhead_s,
                sheet.itl_s.item(at),
                queue_s,
                is_short and sheet.loads.item(SEQUENCES, generates) > 0,
            ),
            num_candidates=pool.num_candidates,
            handoff_s=moved_s,
        )
