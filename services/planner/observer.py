"""What has happened since the last look, from the sums of all router copies. Pure.

Rates are by each copy's own clock, so a late or lost reading makes none of them wrong. A copy that
has started again counts from its start; one that is seen for the first time, and has been there for
longer than the last look, counts from the next look on. What lengths requests have is a mean with a
memory of `LENGTHS_S`, since few of them end between two looks. Attainment is told once enough
requests have ended for it to say something.

Does not know: where the sums come from, what is decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

from baton.core.worker_info import Role
from services.planner.actuator import PlannedWorker, WorkerPhase
from services.planner.autoscale import MIN_SAMPLES, Observation, PoolState
from services.planner.demand import Load
from services.router.pool_stats import DecodeSums, PoolMoment, PoolStats, PrefillSums

LENGTHS_S = 60.0
"""Time constant of the means of prompts and outputs."""
SAMPLES_S = 180.0
"""Misses are gathered for so long at most; what is older says nothing of now."""
FORGET_S = 3600.0
"""A copy that has not answered for so long is gone."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Since the last look."""

    observation: Observation
    num_copies: int
    """That answered."""
    num_refused: float
    prefill_steps: PrefillSums
    decode_steps: DecodeSums


@dataclass(slots=True)
class _Mean:
    """Sums that fade, of which a mean is made."""

    num: float = 0.0
    sums: list[float] = field(default_factory=list)

    def add(self, num: float, sums: Sequence[float], kept: float) -> None:
        if num <= 0:
            # Nothing came: what was known stays as good as it was.
            return
        old = self.sums or [0.0] * len(sums)
        self.num = self.num * kept + num
        self.sums = [a * kept + b for a, b in zip(old, sums, strict=True)]

    def of(self, i: int, otherwise: float) -> float:
        return self.sums[i] / self.num if self.num > 0 else otherwise


@dataclass(slots=True)
class _Samples:
    """Requests judged, until there are enough of them."""

    met: float = 0.0
    measured: float = 0.0
    since_s: float = float("-inf")

    def take(self, now_s: float, met: float, measured: float) -> tuple[float | None, int]:
        """Attainment and the number of requests behind it, once these are enough; every request
        counts once."""
        if now_s - self.since_s > SAMPLES_S:
            self._restart(now_s)
        self.met += met
        self.measured += measured
        if self.measured < MIN_SAMPLES:
            return None, 0
        told = min(1.0, self.met / self.measured), round(self.measured)
        self._restart(now_s)
        return told

    def _restart(self, now_s: float) -> None:
        self.met = self.measured = 0.0
        self.since_s = now_s


class Observer:
    """`observe` in order of time."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, PoolStats]] = {}
        """By copy: its last reading, and when that was."""
        self._last_s: float | None = None
        self._prompts, self._outputs = _Mean(), _Mean()
        self._ttft, self._itl = _Samples(), _Samples()

    def observe(
        self,
        now_s: float,
        copies: Mapping[str, PoolStats],
        workers: Sequence[PlannedWorker] | None = None,
    ) -> Seen | None:
        """`copies`: those that answered. `workers`: who is there, where somebody starts them; else
        as the copies see it. None when there is nothing to compare with yet.

        Raises ValueError when time goes backwards.
        """
        if self._last_s is not None and now_s < self._last_s:
            raise ValueError(f"time went from {self._last_s:g} back to {now_s:g}")
        since_s = self._last_s
        deltas = [self._delta(name, stats, now_s) for name, stats in copies.items()]
        new = [delta for delta in deltas if delta is not None]
        self._last_s = now_s
        for name in [n for n, (at_s, _) in self._known.items() if now_s - at_s > FORGET_S]:
            del self._known[name]
        if not new:
            return None
        return self._seen(now_s, since_s, new, copies, workers)

    def _delta(self, name: str, stats: PoolStats, now_s: float) -> PoolStats | None:
        """What one copy did since it was last asked; None when that cannot be told."""
        known = self._known.get(name)
        self._known[name] = now_s, stats
        before_s = known[0] if known is not None else self._last_s
        if before_s is not None and 0 < stats.uptime_s <= now_s - before_s:
            # It has started since, and may be there for longer now than the one before it was.
            return stats
        if known is None or stats.uptime_s == known[1].uptime_s:
            # It started before anybody looked, and its sums are of longer than this.
            return None
        is_same = stats.uptime_s > known[1].uptime_s
        return stats.since(known[1]) if is_same else stats

    def _seen(
        self,
        now_s: float,
        since_s: float | None,
        new: Sequence[PoolStats],
        copies: Mapping[str, PoolStats],
        workers: Sequence[PlannedWorker] | None,
    ) -> Seen:
        total = reduce(PoolStats.plus, new)
        kept = 0.0 if since_s is None else math.exp((since_s - now_s) / LENGTHS_S)
        self._prompts.add(total.num_prompts, (total.uncached_tokens, total.pairs), kept)
        self._outputs.add(total.num_ended, (total.output_tokens, total.held_tokens), kept)
        ttft, num_ttft = self._ttft.take(now_s, total.ttft_met, total.ttft_measured)
        itl, num_itl = self._itl.take(now_s, total.itl_met, total.itl_measured)
        observation = Observation(
            now_s,
            self._load(sum(delta.num_arrived / delta.uptime_s for delta in new)),
            max(num_ttft, num_itl),
            ttft,
            itl,
            _pool_state(Role.PREFILL, now_s, copies, workers),
            _pool_state(Role.DECODE, now_s, copies, workers),
        )
        return Seen(
            observation, len(copies), total.num_refused, total.prefill_steps, total.decode_steps
        )

    def _load(self, rate_per_s: float) -> Load:
        output_tokens = max(1.0, self._outputs.of(0, 1.0))
        return Load(
            rate_per_s,
            max(1.0, self._prompts.of(0, 1.0)),
            max(1.0, self._prompts.of(1, 1.0)),
            output_tokens,
            # Over the time of its decoding, so long outputs count for longer.
            max(1.0, self._outputs.of(1, 1.0) / output_tokens),
        )


def _pool_state(
    role: Role,
    now_s: float,
    copies: Mapping[str, PoolStats],
    workers: Sequence[PlannedWorker] | None,
) -> PoolState:
    moments = [s.prefill if role is Role.PREFILL else s.decode for s in copies.values()]
    kv_usage = sum(m.kv_usage for m in moments) / max(1, len(moments))
    # All copies see the workers' queues; each has one of its own in front of them.
    num_waiting = max((m.num_waiting for m in moments), default=0.0)
    if role is Role.PREFILL:
        num_waiting += sum(stats.num_queued for stats in copies.values())
    if workers is None:
        return _told(moments, now_s, kv_usage, num_waiting)
    mine = [w for w in workers if w.role is role]
    ready = [w for w in mine if w.phase is WorkerPhase.READY]
    return PoolState(
        num_ready=len(ready),
        num_starting=sum(1 for w in mine if w.phase is WorkerPhase.STARTING),
        num_draining=sum(1 for w in mine if w.phase is WorkerPhase.DRAINING),
        last_joined_s=max((w.joined_s for w in ready), default=float("-inf")),
        kv_usage=kv_usage,
        num_waiting=num_waiting,
        num_settled=sum(1 for w in ready if w.is_settled),
    )


def _told(
    moments: Sequence[PoolMoment], now_s: float, kv_usage: float, num_waiting: float
) -> PoolState:
    """As the copies see it: all see the same workers, the best-informed one sees most."""
    return PoolState(
        num_ready=round(max((m.num_ready for m in moments), default=0)),
        num_draining=round(max((m.num_draining for m in moments), default=0)),
        last_joined_s=now_s - min((m.youngest_s for m in moments), default=float("inf")),
        kv_usage=kv_usage,
        num_waiting=num_waiting,
    )
