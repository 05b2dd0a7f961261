"""The last step of a placement: from costs to workers, with what is said of them.

Does not know: how the costs came about.
"""

from __future__ import annotations

import random

import numpy as np

from services.router.placement.candidates import BATCH_ROW, Pool
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement, PlacementKind, Prediction
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.prefix_source import offer_for
from services.router.placement.score_terms import LazyTerms
from services.router.placement.scoring import score_pairs
from services.router.placement.sheet import Sheet
from services.router.placement.speeds import Floats

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

    __slots__ = ("_config", "_noise", "_perf", "_pool", "_sheet")

    def __init__(
        self, sheet: Sheet, pool: Pool, config: PolicyConfig, perf: PerfModel, noise: Noise
    ) -> None:
        self._sheet, self._pool, self._config = sheet, pool, config
        self._perf, self._noise = perf, noise

    def alone(self, workers: slice, reason: str) -> Placement:
        """All on one of `workers`, which are those with decode terms."""
        cost = self._sheet.prefill_cost[workers] + self._sheet.decode_cost
        at = int(self._less_noise(cost).argmin())
        return self._placement(workers.start + at, None, cost.item(at), 0.0, reason)

    def pair(self, is_local_possible: bool) -> Placement:
        """The best pair, or all on one decode worker where that costs less."""
        sheet, num_prefill = self._sheet, self._pool.num_prefill
        prefill_cost, decode_cost = sheet.prefill_cost[:num_prefill], sheet.decode_cost
        less_prefill, less_decode = self._less_noise(prefill_cost), self._less_noise(decode_cost)
        total = score_pairs(sheet, self._pool, less_prefill, less_decode, self._config)
        p, d = divmod(int(total.argmin()), len(decode_cost))
        handoff_s = max(0.0, total.item(p, d) - less_prefill.item(p) - less_decode.item(d))
        score = prefill_cost.item(p) + decode_cost.item(d) + handoff_s
        if is_local_possible:
            at = int(self._less_noise(sheet.local_cost).argmin())
            local = sheet.local_cost.item(at)
            if local < score:
                reason = "cheaper than a hand-off"
                return self._placement(num_prefill + at, None, local, 0.0, reason)
        return self._placement(p, num_prefill + d, score, handoff_s, "lowest cost")

    def _less_noise(self, cost: Floats) -> Floats:
        """The lowest of these is drawn by a soft-max, or among equal ones."""
        less = cost - self._noise.ties(len(cost))
        if self._config.temperature:
            spread = self._config.temperature * abs(float(cost.min()))
            less -= self._noise.draws(len(cost)) * spread
        return less

    def _placement(
        self, computes: int, decodes: int | None, score: float, handoff_s: float, reason: str
    ) -> Placement:
        """`computes`: position of the worker that computes the prompt; `decodes`: of the other."""
        sheet, pool = self._sheet, self._pool
        prefill = decode = None
        chosen: tuple[int, ...]
        if decodes is not None:
            kind, chosen, generates = PlacementKind.REMOTE_PREFILL, (computes, decodes), decodes
            prefill, decode = pool.worker_id(computes), pool.worker_id(decodes)
        elif computes < pool.num_prefill:
            kind, chosen, generates = PlacementKind.PREFILL_ONLY, (computes,), computes
            prefill = pool.worker_id(computes)
        else:
            kind, chosen, generates = PlacementKind.LOCAL_PREFILL, (computes,), computes
            decode = pool.worker_id(computes)
        offer = None
        if sheet.ways is not None and sheet.ways.sources:
            way, least = sheet.way_of(computes), self._config.min_offer_blocks
            offer = offer_for(sheet.ways, pool, computes, way, least)
        queue_s = sheet.queue_s_of(computes)
        predicted = Prediction(
            queue_s + sheet.prefill_s_of(computes) + self._perf.overhead_s,
            sheet.itl_s_of(generates),
            queue_s,
            sheet.missing_of(generates) > 0 and sheet.loads.item(BATCH_ROW, generates) > 0,
        )
        terms = LazyTerms(sheet, chosen)
        return Placement(
            kind, prefill, decode, score, reason, terms, offer, predicted, pool.num_candidates,
            handoff_s,
        )  # fmt: skip
