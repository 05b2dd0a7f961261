"""Whether a request would keep its promises, and those made to others, if it started now.

    time to first token   waited + to wait + predicted + margin   against its target
    time between tokens   predicted for the batch it joins        against its own target and those
                                                                  of requests that run
    room                  work ahead on the worker, KV room

A time between tokens that the worker would not keep for one request alone is promised to nobody:
waiting for it would hold up all others, and in vain.

After a rejection only `shed_ratio` of the targets counts until things are calm, and margins are
learned for both predictions. Nothing is refused for a prediction while there is no work to blame.

A plain state machine. Does not know: queues, tenants, where predictions come from.
"""

from __future__ import annotations

import math
from collections import Counter
from enum import Enum
from typing import NamedTuple

from services.router.admission.safety_margin import SafetyMargin
from services.router.admission.ticket import Refusal, Ticket
from services.router.placement.placement import Prediction


class Verdict(Enum):
    ADMIT = "admit"
    WAIT = "wait"
    REJECT = "reject"


class Judgement(NamedTuple):
    verdict: Verdict
    reason: Refusal | None = None
    excess_s: float = 0.0
    """When rejected: seconds by which the work ahead would have to shrink."""


ADMIT, WAIT = Judgement(Verdict.ADMIT), Judgement(Verdict.WAIT)


class Judge:
    """Of one model."""

    def __init__(self, *, max_ahead_s: float, shed_ratio: float, calm_s: float) -> None:
        self._max_ahead_s = max_ahead_s
        self._shed_ratio = shed_ratio
        self._calm_s = calm_s
        self._shed_at_s = -math.inf
        self.ttft_margin, self.itl_margin = SafetyMargin(), SafetyMargin()
        self._itl_targets: Counter[float] = Counter()
        """Of the requests that run."""
        self.num_running = 0

    def is_shedding(self, now_s: float) -> bool:
        """A request has been sent away lately."""
        return now_s - self._shed_at_s < self._calm_s

    def shed(self, now_s: float) -> None:
        """A request has been sent away."""
        self._shed_at_s = now_s

    def started(self, ticket: Ticket) -> None:
        self.num_running += 1
        if ticket.promised_itl_s is not None:
            self._itl_targets[ticket.promised_itl_s] += 1

    def ended(self, ticket: Ticket) -> None:
        """Once for each `started`."""
        self.num_running -= 1
        promised_s = ticket.promised_itl_s
        if promised_s is not None:
            self._itl_targets[promised_s] -= 1
            if not self._itl_targets[promised_s]:
                del self._itl_targets[promised_s]

    def judge(
        self,
        ticket: Ticket,
        predicted: Prediction,
        now_s: float,
        *,
        alone_itl_s: float = 0.0,
        wait_s: float = 0.0,
        is_arriving: bool = False,
    ) -> Judgement:
        """`alone_itl_s`: predicted with nobody beside it. `wait_s`: until it is its turn. Writes
        the prediction into `ticket`, and what it is promised.

        A request that has waited is held to its whole target: it was taken on by the smaller one.
        """
        ticket.own_s = max(0.0, predicted.ttft_s - predicted.queued_s)
        ticket.predicted_ttft_s = now_s - ticket.arrived_at_s + wait_s + predicted.ttft_s
        ticket.predicted_itl_s = predicted.itl_s
        own_itl_s = ticket.targets.itl_s
        is_kept = own_itl_s is not None and own_itl_s >= alone_itl_s
        ticket.promised_itl_s = own_itl_s if is_kept else None
        ratio = self._shed_ratio if self.is_shedding(now_s) else 1.0
        target_s = ticket.targets.ttft_s
        ahead_s = wait_s + predicted.queued_s
        if target_s is not None and ahead_s > 0:
            limit_s = target_s * (ratio if is_arriving else 1.0) - self.ttft_margin.of(target_s)
            excess_s = ticket.predicted_ttft_s - limit_s
            if excess_s > 0:
                reason = Refusal.TTFT if is_arriving else ticket.wait_reason or Refusal.LATE
                # Without what is ahead of it, it would be admitted whatever is predicted.
                return Judgement(Verdict.REJECT, reason, min(excess_s, ahead_s))
        itl_target_s = self._itl_target_s(ticket)
        itl_limit_s = itl_target_s * ratio - self.itl_margin.of(itl_target_s)
        if self.num_running and predicted.itl_s > itl_limit_s:
            return Judgement(Verdict.WAIT, Refusal.ITL)
        if predicted.needs_room or predicted.queued_s > self._max_ahead_s:
            return WAIT
        return ADMIT

    def learn(self, ticket: Ticket, *, ttft_s: float | None, mean_itl_s: float | None) -> None:
        """What came of the prediction; None: the request did not get so far."""
        targets = ticket.targets
        self.ttft_margin.learn(ticket.predicted_ttft_s, ttft_s, targets.ttft_s)
        self.itl_margin.learn(ticket.predicted_itl_s, mean_itl_s, targets.itl_s)

    def check_integrity(self) -> None:
        """Raises AssertionError on a state that must not exist."""
        assert self.num_running >= 0 and self._itl_targets.total() <= self.num_running
        assert all(count > 0 for count in self._itl_targets.values())

    def _itl_target_s(self, ticket: Ticket) -> float:
        """Its own or that of a request that runs, whatever is less: the batch is one."""
        own_s = ticket.promised_itl_s
        return min(math.inf if own_s is None else own_s, *self._itl_targets, math.inf)
