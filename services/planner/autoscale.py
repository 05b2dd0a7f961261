"""How many workers each pool is to have: a state machine without clock or I/O.

    observe ─► load of now and of soon ─► workers that it needs ─► up at once
                                                              └─► down to the most that any moment
                                                                  of the window needed

The window is the counterfactual: a pool gives up a worker when the pool without it would have kept
the targets all that time. A model that is too bold is corrected by attainment: what is missed
although it was planned for raises a margin, which fades again.

Does not know: how workers are started and drained, what anybody else decides.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass

from baton.core.worker_info import Role
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.autoscaler_state import AutoscalerState, PoolMemory
from services.planner.demand import Load, decode_workers, prefill_workers
from services.planner.forecast import ArrivalForecast, Forecast
from services.planner.pool_model import PoolModel

MARGIN_STEP = 1.25
MAX_MARGIN = 4.0
MARGIN_FADE_S = 600.0
"""Until a margin has lost half of what it adds."""
MIN_SAMPLES = 20
"""Requests of a moment whose attainment says something."""
HIGH_KV_USAGE = 0.9
MIN_CATCH_UP_S = 10.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """One pool as it is."""

    num_ready: int
    num_starting: int = 0
    num_draining: int = 0
    last_joined_s: float = float("-inf")
    kv_usage: float = 0.0
    """Mean share of KV memory held, 0 to 1."""
    num_waiting: float = 0.0
    """Requests that wait for their first step: on its workers, and those of the prefill pool in
    routers too."""
    num_settled: int = 0
    """Of the ready ones, those that do not change their role for now."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Since the last one. Attainment is None when nothing was measured."""

    now_s: float
    load: Load
    num_requests: int
    ttft_attainment: float | None
    itl_attainment: float | None
    prefill: PoolState
    decode: PoolState


@dataclass(frozen=True, slots=True)
class PoolDecision:
    """What one pool is to have, and why."""

    desired: int
    needed_now: int
    needed_soon: int
    kept_for: int
    """The most that any moment of the window needed."""
    margin: float
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    now_s: float
    prefill: PoolDecision
    decode: PoolDecision
    num_role_changes: int
    """Workers that go from the shrinking pool to the growing one, where their sizes are equal:
    above 0 from prefill to decode, below 0 the other way."""
    forecast: Forecast
    is_at_budget: bool
    """More would be needed than `max_devices` allows."""


class Autoscaler:
    """`decide` every few seconds, in order of time."""

    def __init__(self, config: AutoscaleConfig, prefill: PoolModel, decode: PoolModel) -> None:
        self._config = config
        self._models = {Role.PREFILL: prefill, Role.DECODE: decode}
        self._arrivals = ArrivalForecast(window_s=config.window_s, burst_share=config.burst_share)
        keep_s = keep_window_s(config, prefill, decode)
        self._pools = {role: _Pool(keep_s) for role in self._models}

    def decide(self, seen: Observation) -> Decision:
        """Raises ValueError when time goes backwards."""
        config = self._config
        self._arrivals.observe(seen.now_s, seen.load.rate_per_s)
        ahead_s = max(config.forecast_s, *(m.start_s for m in self._models.values()))
        forecast = self._arrivals.at(seen.now_s + ahead_s)
        seen = at_rate(seen, forecast.now)
        if forecast.rate_per_s * config.window_s < 1:
            # A level fades without end; less than one request in a window keeps no pool awake.
            forecast = Forecast(forecast.now, 0.0, 0.0, 1.0, 0.0)
        self._learn(seen)
        planned = {role: self._plan(role, seen, forecast) for role in (Role.PREFILL, Role.DECODE)}
        fitted, is_at_budget = self._fit(planned)
        num_lent = self._lend(seen, fitted)
        for role, decision in fitted.items():
            self._pools[role].last_desired = decision.desired
        return Decision(
            seen.now_s,
            fitted[Role.PREFILL],
            fitted[Role.DECODE],
            num_lent,
            forecast,
            is_at_budget,
        )

    def use(self, prefill: PoolModel, decode: PoolModel) -> None:
        """Models for the decisions that follow."""
        self._models = {Role.PREFILL: prefill, Role.DECODE: decode}

    def state(self) -> AutoscalerState:
        """All that the next decision rests on, beside settings and models."""
        prefill, decode = (self._pools[role].state() for role in (Role.PREFILL, Role.DECODE))
        return AutoscalerState(self._arrivals.state(), prefill, decode)

    def restore(self, state: AutoscalerState) -> None:
        """Go on from there."""
        self._arrivals.restore(state.arrivals)
        self._pools[Role.PREFILL].restore(state.prefill)
        self._pools[Role.DECODE].restore(state.decode)

    def _learn(self, seen: Observation) -> None:
        """Attainment corrects the model, unless the sample is small or a worker was cold."""
        for role, state, attained in (
            (Role.PREFILL, seen.prefill, seen.ttft_attainment),
            (Role.DECODE, seen.decode, seen.itl_attainment),
        ):
            pool = self._pools[role]
            is_cold = seen.now_s - state.last_joined_s < self._config.cold_s
            # What the model itself calls too few corrects nothing either.
            needed = self._needed(role, seen.load, seen.load.rate_per_s)
            is_short = state.num_ready < max(pool.last_desired, needed)
            if is_cold or is_short or attained is None or seen.num_requests < MIN_SAMPLES:
                pool.fade(seen.now_s)
            else:
                pool.correct(seen.now_s, is_missed=attained < self._config.share)

    def _plan(self, role: Role, seen: Observation, forecast: Forecast) -> PoolDecision:
        pool, limits = self._pools[role], self._limits(role)
        state = _state(seen, role)
        planned = self._config.headroom * pool.margin
        queued = catch_up_per_s(seen, self._config, self._models[Role.PREFILL])
        now = self._needed(role, seen.load, (seen.load.rate_per_s + queued) * planned)
        soon = self._needed(role, seen.load, forecast.rate_per_s * planned)
        if role is Role.DECODE and state.kv_usage > HIGH_KV_USAGE:
            now = max(now, state.num_ready + 1)
        calm = self._config.shrink_headroom * planned
        enough = self._needed(role, seen.load, seen.load.rate_per_s * calm)
        have = _have(state)
        # Nothing is known of a window in which nobody looked, and somebody has started these.
        least = have if pool.is_new(seen.now_s) else 0
        kept = pool.remember(seen.now_s, max(now, soon, enough, least))
        # What was needed keeps workers, and never asks for new ones.
        kept = min(kept, have)
        wanted = max(limits.min_workers, min(limits.max_workers, max(now, soon, kept)))
        reason = _reason(wanted, have, now, soon, kept, limits)
        return PoolDecision(wanted, now, soon, kept, pool.margin, reason)

    def _needed(self, role: Role, load: Load, rate_per_s: float) -> int:
        config, model = self._config, self._models[role]
        load = dataclasses.replace(load, rate_per_s=rate_per_s)
        if role is Role.PREFILL:
            return prefill_workers(model, load, ttft_s=config.ttft_s, share=config.share)
        return decode_workers(model, load, itl_s=config.itl_s)

    def _fit(self, planned: dict[Role, PoolDecision]) -> tuple[dict[Role, PoolDecision], bool]:
        """Both within the devices, worker by worker: what is only kept gives way first, then the
        pool that is better off without one."""
        wanted = {role: decision.desired for role, decision in planned.items()}
        needed = {
            role: min(decision.desired, max(decision.needed_now, decision.needed_soon))
            for role, decision in planned.items()
        }
        given = dict(wanted)
        while self._num_devices(given) > self._config.max_devices:
            shrinkable = [r for r in given if given[r] > self._limits(r).min_workers]
            role = max(shrinkable, key=lambda r: (given[r] > needed[r], (given[r] - 1) / wanted[r]))
            given[role] -= 1
        fitted = dict(planned)
        for role, decision in planned.items():
            if given[role] < wanted[role]:
                when = "needed" if given[role] < needed[role] else "were needed within the window"
                reason = (
                    f"{wanted[role]} {when}, {self._config.max_devices} devices allow {given[role]}"
                )
                fitted[role] = dataclasses.replace(decision, desired=given[role], reason=reason)
        return fitted, any(given[role] < needed[role] for role in given)

    def _lend(self, seen: Observation, fitted: dict[Role, PoolDecision]) -> int:
        """Role changes; the lender's decision in `fitted` is lowered by them.

        A worker that changes its role is back within seconds, so what a pool can spare now is
        enough: its window guards against giving workers up, not against lending them.
        """
        sizes = {model.tensor_parallel for model in self._models.values()}
        if len(sizes) > 1 or not self._config.can_change_roles:
            return 0
        for lender, borrower, sign in (
            (Role.PREFILL, Role.DECODE, 1),
            (Role.DECODE, Role.PREFILL, -1),
        ):
            num = min(self._spare(seen, lender, fitted), self._short(seen, borrower, fitted))
            if num > 0:
                left = _have(_state(seen, lender)) - num
                fitted[lender] = dataclasses.replace(
                    fitted[lender],
                    desired=min(fitted[lender].desired, left),
                    reason=f"{num} of {left + num} go over to {borrower.value}, which is short",
                )
                return sign * num
        return 0

    def _spare(self, seen: Observation, role: Role, fitted: dict[Role, PoolDecision]) -> int:
        state, decision = _state(seen, role), fitted[role]
        least = max(decision.needed_now, decision.needed_soon, self._limits(role).min_workers)
        return min(state.num_ready - state.num_settled, _have(state) - least)

    def _short(self, seen: Observation, role: Role, fitted: dict[Role, PoolDecision]) -> int:
        return fitted[role].desired - _have(_state(seen, role))

    def _num_devices(self, workers: dict[Role, int]) -> int:
        return sum(num * self._limits(role).devices_per_worker for role, num in workers.items())

    def _limits(self, role: Role) -> PoolLimits:
        return self._config.prefill if role is Role.PREFILL else self._config.decode


def keep_window_s(config: AutoscaleConfig, *models: PoolModel) -> float:
    """For so long a pool keeps what it needed: a worker that a request has asked for lives to see
    it."""
    return max(config.window_s, *(2 * model.start_s for model in models))


def at_rate(seen: Observation, rate_per_s: float) -> Observation:
    """With a steady rate: that of one interval is noise where few requests come."""
    return dataclasses.replace(seen, load=dataclasses.replace(seen.load, rate_per_s=rate_per_s))


def catch_up_per_s(seen: Observation, config: AutoscaleConfig, prefill: PoolModel) -> float:
    """Requests per second on top of those that arrive, for the queue to be gone within the time
    that a new worker takes to start. What keeps the TTFT in any case is no queue."""
    excess = seen.prefill.num_waiting - seen.load.rate_per_s * config.ttft_s
    return max(0.0, excess) / max(MIN_CATCH_UP_S, prefill.start_s)


class _Pool:
    """What one pool needed lately, and how wrong its model is."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._needed: deque[tuple[float, int]] = deque()
        self._margin_s: float | None = None
        self.margin = 1.0
        self.last_desired = 0

    def is_new(self, now_s: float) -> bool:
        """Nothing is known of the window."""
        return not self._needed or self._needed[-1][0] < now_s - self._window_s

    def remember(self, now_s: float, needed: int) -> int:
        """The most of the window. Kept falling from front to back, so the front is the most."""
        while self._needed and self._needed[-1][1] <= needed:
            self._needed.pop()
        self._needed.append((now_s, needed))
        while self._needed[0][0] < now_s - self._window_s:
            self._needed.popleft()
        return self._needed[0][1]

    def state(self) -> PoolMemory:
        return PoolMemory(
            tuple(at_s for at_s, _ in self._needed),
            tuple(needed for _, needed in self._needed),
            self.margin,
            self._margin_s,
            self.last_desired,
        )

    def restore(self, state: PoolMemory) -> None:
        self._needed = deque(zip(state.needed_s, state.needed, strict=True))
        self.margin, self._margin_s = state.margin, state.margin_s
        self.last_desired = state.last_desired

    def correct(self, now_s: float, *, is_missed: bool) -> None:
        self.fade(now_s)
        if is_missed:
            self.margin = min(MAX_MARGIN, self.margin * MARGIN_STEP)

    def fade(self, now_s: float) -> None:
        if self._margin_s is not None:
            kept = 0.5 ** ((now_s - self._margin_s) / MARGIN_FADE_S)
            self.margin = 1.0 + (self.margin - 1.0) * kept
        self._margin_s = now_s


def _state(seen: Observation, role: Role) -> PoolState:
    return seen.prefill if role is Role.PREFILL else seen.decode


def _have(state: PoolState) -> int:
    return state.num_ready + state.num_starting


def _reason(wanted: int, have: int, now: int, soon: int, kept: int, limits: PoolLimits) -> str:
    needed = max(now, soon, kept)
    if needed > limits.max_workers:
        return f"{needed} needed, max_workers is {limits.max_workers}"
    if needed < limits.min_workers:
        return f"{needed} needed, min_workers is {limits.min_workers}"
    if wanted > have:
        when = "now" if now >= soon else "by the time a new worker is ready"
        return f"{max(now, soon)} needed {when}, {have} there"
    if wanted < have:
        return f"{wanted} would have been enough all through the window, {have} there"
    if wanted > max(now, soon):
        return f"{max(now, soon)} would do now, but {kept} were needed within the window"
    return f"{wanted} needed, {have} there"
