"""What a simulated run tells an autoscaler: the sums that a router copy would tell. Pure.

Does not know: workers, what is decided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from baton.core.worker_info import Role
from baton.simulator.outcome import Outcome
from baton.simulator.workload import Arrival
from services.planner.objective import Objective
from services.router.admission.slo import SloTargets
from services.router.pool_stats import PoolMoment, PoolStats


class RunStats:
    """`at` in order of time; outcomes are filled in meanwhile."""

    def __init__(
        self, arrivals: Sequence[Arrival], outcomes: Sequence[Outcome], objective: Objective
    ) -> None:
        self._arrivals, self._outcomes = arrivals, outcomes
        self._targets = SloTargets(objective.ttft_s, objective.itl_s)
        self._num_arrived = 0
        self._open: list[int] = []
        """Numbers of those that have arrived and are not over; the next two are parts of it."""
        self._prompted: set[int] = set()
        self._sums = PoolStats(0.0, ttft_target_s=objective.ttft_s, itl_target_s=objective.itl_s)

    @property
    def is_over(self) -> bool:
        """Nobody is left, and nobody is still to come, as of the last look."""
        return not self._open and self._num_arrived == len(self._arrivals)

    def at(self, now_s: float, moments: dict[Role, PoolMoment]) -> PoolStats:
        """Sums from the start until now."""
        add = dict.fromkeys(_SUMMED, 0.0)
        while self._num_arrived < len(self._arrivals):
            if self._arrivals[self._num_arrived].at_s > now_s:
                break
            self._open.append(self._num_arrived)
            self._num_arrived += 1
            add["num_arrived"] += 1
        still_open = []
        for number in self._open:
            outcome, arrival = self._outcomes[number], self._arrivals[number]
            if outcome.num_output_tokens and number not in self._prompted:
                self._prompted.add(number)
                _add_prompt(add, outcome)
            if outcome.refused_s is not None:
                add["num_refused"] += 1
            elif outcome.num_output_tokens >= arrival.num_output_tokens:
                self._prompted.discard(number)
                self._add_end(add, outcome)
            else:
                still_open.append(number)
        self._open = still_open
        self._sums = dataclasses.replace(
            self._sums,
            uptime_s=now_s,
            num_running=float(len(still_open)),
            prefill=moments[Role.PREFILL],
            decode=moments[Role.DECODE],
            **{name: getattr(self._sums, name) + number for name, number in add.items()},
        )
        return self._sums

    def _add_end(self, add: dict[str, float], outcome: Outcome) -> None:
        prompt, output = outcome.num_prompt_tokens, outcome.num_output_tokens
        add["num_ended"] += 1
        add["output_tokens"] += output
        add["held_tokens"] += prompt * output + output * output / 2
        met = outcome.against(self._targets)
        for name, is_met in (("ttft", met.is_ttft_met), ("itl", met.is_itl_met)):
            if is_met is not None:
                add[f"{name}_measured"] += 1
                add[f"{name}_met"] += is_met


def _add_prompt(add: dict[str, float], outcome: Outcome) -> None:
    cached = outcome.num_cached_tokens
    computed = outcome.num_prompt_tokens - cached
    add["num_prompts"] += 1
    add["uncached_tokens"] += computed
    add["pairs"] += computed * (cached + computed / 2)


_SUMMED = (
    "num_arrived", "num_refused", "num_prompts", "uncached_tokens", "pairs", "num_ended",
    "output_tokens", "held_tokens", "ttft_met", "ttft_measured", "itl_met", "itl_measured",
)  # fmt: skip
