"""Where a router copy counts what it tells planners: some additions a request, none a token.

    admission ─► arrived, refused, judged        first answer of a worker ─► prompt
    end of a request ─► output                   what it measured ─► prefill_steps, decode_steps
    once a second ─► look: who is there

Does not know: who reads it, how requests are served.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from baton.core.worker_info import Epoch, Role, WorkerId
from services.router.admission.slo import SloTargets
from services.router.pool_stats import DecodeSums, PoolMoment, PoolStats, PrefillSums
from services.router.pool_stats_config import PoolStatsConfig
from services.router.workers.cluster_view import ClusterView, WorkerState

_Key = tuple[WorkerId, Epoch, Role]


@dataclass(slots=True)
class _Sums:
    """Those fields of `PoolStats`, by the same names."""

    num_arrived: float = 0.0
    num_refused: float = 0.0
    num_prompts: float = 0.0
    uncached_tokens: float = 0.0
    pairs: float = 0.0
    num_ended: float = 0.0
    output_tokens: float = 0.0
    held_tokens: float = 0.0
    ttft_met: float = 0.0
    ttft_measured: float = 0.0
    itl_met: float = 0.0
    itl_measured: float = 0.0
    num_judged: float = 0.0
    num_kept: float = 0.0


@dataclass(slots=True)
class PoolStatsBook:
    """One per router, on its event loop. Times are the loop's."""

    config: PoolStatsConfig
    started_at_s: float
    _sums: _Sums = field(default_factory=_Sums)
    _prefill: PrefillSums = field(default_factory=PrefillSums)
    _decode: DecodeSums = field(default_factory=DecodeSums)
    _ready_at_s: dict[_Key, float] = field(default_factory=dict)
    """Of workers that are ready now."""
    _has_looked: bool = False

    @property
    def targets(self) -> SloTargets:
        """Of requests without any."""
        return SloTargets(self.config.ttft_s, self.config.itl_s)

    def arrived(self) -> None:
        """A request has come as far as admission."""
        self._sums.num_arrived += 1

    def refused(self) -> None:
        """One that had arrived was sent away."""
        self._sums.num_refused += 1

    def judged(self, *, is_ttft_met: bool | None, is_itl_met: bool | None) -> None:
        """A request is over; None where there is nothing to judge."""
        sums = self._sums
        if is_ttft_met is not None:
            sums.ttft_measured += 1
            sums.ttft_met += is_ttft_met
        if is_itl_met is not None:
            sums.itl_measured += 1
            sums.itl_met += is_itl_met
        judged = [met for met in (is_ttft_met, is_itl_met) if met is not None]
        if judged:
            sums.num_judged += 1
            sums.num_kept += all(judged)

    def prompt(self, num_tokens: int, num_cached: int) -> None:
        """A worker has taken up a prompt, and has so much of it."""
        uncached = max(0, num_tokens - num_cached)
        self._sums.num_prompts += 1
        self._sums.uncached_tokens += uncached
        self._sums.pairs += uncached * (num_cached + uncached / 2)

    def output(self, num_prompt_tokens: int, num_tokens: int) -> None:
        """A request that generated something is over."""
        self._sums.num_ended += 1
        self._sums.output_tokens += num_tokens
        # Its context grows by a token with every token.
        self._sums.held_tokens += num_tokens * (num_prompt_tokens + num_tokens / 2)

    def prefill_steps(self, num_uncached: int, num_cached: int, engine_s: float) -> None:
        """What a prefill worker measured of one prompt."""
        sums = self._prefill
        self._prefill = PrefillSums(
            num=sums.num + 1,
            tokens=sums.tokens + num_uncached,
            pairs=sums.pairs + num_uncached * (num_cached + num_uncached / 2),
            engine_s=sums.engine_s + engine_s,
        )

    def decode_steps(self, batch: float, kv_tokens: float, step_s: float) -> None:
        """The mean step of one request on a decode worker."""
        sums = self._decode
        self._decode = DecodeSums(
            num=sums.num + 1,
            batch=sums.batch + batch,
            kv_tokens=sums.kv_tokens + kv_tokens,
            step_s=sums.step_s + step_s,
        )

    def look(self, view: ClusterView, now_s: float) -> None:
        """To be called once a second: who has become ready since."""
        ready = {_key(w) for w in view.workers if w.is_eligible}
        for gone in self._ready_at_s.keys() - ready:
            del self._ready_at_s[gone]
        # Those of the first looks were there before.
        at_s = now_s if self._has_looked else self.started_at_s
        for key in ready:
            self._ready_at_s.setdefault(key, at_s)
        self._has_looked |= bool(ready)

    def read(
        self, view: ClusterView, now_s: float, *, num_running: int, num_queued: int
    ) -> PoolStats:
        """Everything until now."""
        self.look(view, now_s)
        return PoolStats(
            uptime_s=now_s - self.started_at_s,
            ttft_target_s=self.config.ttft_s or 0.0,
            itl_target_s=self.config.itl_s or 0.0,
            **{part.name: getattr(self._sums, part.name) for part in fields(self._sums)},
            num_running=num_running,
            num_queued=num_queued,
            prefill_steps=self._prefill,
            decode_steps=self._decode,
            prefill=self._moment(view, Role.PREFILL, now_s),
            decode=self._moment(view, Role.DECODE, now_s),
        )

    def _moment(self, view: ClusterView, role: Role, now_s: float) -> PoolMoment:
        mine = [w for w in view.workers if w.info.role is role and not w.is_quarantined]
        ready = [w for w in mine if w.is_eligible]
        joined = [self._ready_at_s[_key(w)] for w in ready]
        return PoolMoment(
            num_ready=len(ready),
            num_draining=sum(1 for w in mine if w.is_ending),
            kv_usage=sum(w.load.kv_usage for w in ready) / max(1, len(ready)),
            num_waiting=sum(w.load.num_waiting for w in mine),
            youngest_s=now_s - max(joined, default=self.started_at_s),
        )


def _key(worker: WorkerState) -> _Key:
    return worker.info.worker_id, worker.info.epoch, worker.info.role
