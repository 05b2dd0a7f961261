"""Whether a request would keep its promises, and those made to others, if it started now.

    time to first token   waited + to wait + predicted + margin   against its target
    time between tokens   predicted for the batch it joins        against its own target and those
                                                                  of requests that run
    room                  work ahead on the worker, KV room

Times between tokens are promised worker by worker: a batch is as slow as its own sequences make it,
and another worker's promises do not bind it. One that the worker would not keep for one request
alone is promised to nobody: waiting for it would hold up all others, and in vain.

After a rejection only `shed_ratio` of the targets counts until things are calm, and margins are
learned for both predictions. Nothing is refused for a prediction while there is no work to blame.

A plain state machine. Does not know: queues, tenants, where predictions come from.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from baton.core.worker_info import WorkerId
from services.router.admission.safety_margin import SafetyMargin
from services.router.admission.ticket import Prospect, Refusal, Ticket
from services.router.placement.placement import Prediction

MAX_OVER = 1000
ITL_SAFE_SHARE = 0.98
"""Of requests that shall keep their time between tokens: more than of first tokens, since batches
are filled until it is just kept."""


class Verdict(Enum):
    ADMIT = "admit"
    WAIT = "wait"
    REJECT = "reject"


class Judgement(NamedTuple):
    verdict: Verdict
    reason: Refusal | None = None
    excess_s: float = 0.0
    """When rejected: seconds by which the work ahead would have to shrink."""
    num_over: int = 0
    """When it waits for a faster batch: sequences that have to end on the worker first."""


ADMIT, WAIT = Judgement(Verdict.ADMIT), Judgement(Verdict.WAIT)


@dataclass(slots=True)
class _Promises:
    """On one decode worker."""

    num_running: int = 0
    itl_targets: Counter[float] = field(default_factory=Counter)


class Judge:
    """Of one model."""

    def __init__(self, *, max_ahead_s: float, shed_ratio: float, calm_s: float) -> None:
        self._max_ahead_s = max_ahead_s
        self._shed_ratio = shed_ratio
        self._calm_s = calm_s
        self._shed_at_s = -math.inf
        self.ttft_margin = SafetyMargin()
        self.itl_margin = SafetyMargin(safe_share=ITL_SAFE_SHARE)
        self._promises: dict[WorkerId | None, _Promises] = {}
        """Of the workers on which requests run."""
        self.num_running = 0

    def is_shedding(self, now_s: float) -> bool:
        """A request has been sent away lately."""
        return now_s - self._shed_at_s < self._calm_s

    def shed(self, now_s: float) -> None:
        """A request has been sent away."""
        self._shed_at_s = now_s

    def started(self, ticket: Ticket) -> None:
        """On the worker of its last judgement."""
        self.num_running += 1
        promises = self._promises.setdefault(ticket.decode, _Promises())
        promises.num_running += 1
        if ticket.promised_itl_s is not None:
            promises.itl_targets[ticket.promised_itl_s] += 1

    def ended(self, ticket: Ticket) -> None:
        """Once for each `started`."""
        self.num_running -= 1
        promises = self._promises[ticket.decode]
        promises.num_running -= 1
        promised_s = ticket.promised_itl_s
        if promised_s is not None:
            promises.itl_targets[promised_s] -= 1
            if not promises.itl_targets[promised_s]:
                del promises.itl_targets[promised_s]
        if not promises.num_running:
            del self._promises[ticket.decode]

    def judge(
        self,
        ticket: Ticket,
        prospect: Prospect,
        now_s: float,
        *,
        wait_s: float = 0.0,
        is_arriving: bool = False,
    ) -> Judgement:
        """`prospect` with a prediction. `wait_s`: until it is its turn. Writes the prediction into
        `ticket`, and what it is promised.

        A request that has waited is held to its whole target: it was taken on by the smaller one.
        """
        predicted = prospect.predicted
        assert predicted is not None
        self._note(ticket, prospect, predicted, now_s + wait_s)
        ratio = self._shed_ratio if self.is_shedding(now_s) else 1.0
        target_s = ticket.targets.ttft_s
        ahead_s = wait_s + predicted.queued_s
        if target_s is not None and ahead_s > 0:
            assert ticket.predicted_ttft_s is not None
            limit_s = target_s * (ratio if is_arriving else 1.0) - self.ttft_margin.of(target_s)
            excess_s = ticket.predicted_ttft_s - limit_s
            if excess_s > 0:
                reason = Refusal.TTFT if is_arriving else ticket.wait_reason or Refusal.LATE
                # Without what is ahead of it, it would be admitted whatever is predicted.
                return Judgement(Verdict.REJECT, reason, min(excess_s, ahead_s))
        over_s = predicted.itl_s - self._itl_limit_s(ticket, ratio)
        if over_s > 0:
            relief_s = max(prospect.itl_relief_s, over_s / MAX_OVER)
            return Judgement(Verdict.WAIT, Refusal.ITL, num_over=math.ceil(over_s / relief_s))
        if predicted.needs_room or predicted.queued_s > self._max_ahead_s:
            return WAIT
        return ADMIT

    def latest_start_s(self, ticket: Ticket) -> float:
        """Until when it has to have its turn; infinite where it has no target."""
        target_s = ticket.targets.ttft_s
        if target_s is None:
            return math.inf
        return ticket.arrived_at_s + target_s - ticket.own_s

    def learn(self, ticket: Ticket, *, ttft_s: float | None, mean_itl_s: float | None) -> None:
        """What came of the prediction; None: the request did not get so far."""
        targets = ticket.targets
        self.ttft_margin.learn(ticket.predicted_ttft_s, ttft_s, targets.ttft_s)
        predicted_s, target_s = ticket.predicted_itl_s, targets.itl_s
        if predicted_s is not None and target_s is not None:
            # Batches grow to what was promised after the request has joined: that is no mistake.
            predicted_s = max(predicted_s, target_s - self.itl_margin.of(target_s))
        self.itl_margin.learn(predicted_s, mean_itl_s, target_s)

    def check_integrity(self) -> None:
        """Raises AssertionError on a state that must not exist."""
        assert self.num_running == sum(p.num_running for p in self._promises.values())
        for promises in self._promises.values():
            assert promises.num_running > 0
            assert promises.itl_targets.total() <= promises.num_running
            assert all(count > 0 for count in promises.itl_targets.values())

    def _note(
        self, ticket: Ticket, prospect: Prospect, predicted: Prediction, turn_at_s: float
    ) -> None:
        ticket.own_s = max(0.0, predicted.ttft_s - predicted.queued_s)
        ticket.predicted_ttft_s = turn_at_s - ticket.arrived_at_s + predicted.ttft_s
        ticket.predicted_itl_s = predicted.itl_s
        ticket.decode = prospect.decode
        own_itl_s = ticket.targets.itl_s
        is_kept = own_itl_s is not None and own_itl_s >= prospect.alone_itl_s
        ticket.promised_itl_s = own_itl_s if is_kept else None

    def _itl_limit_s(self, ticket: Ticket, ratio: float) -> float:
        """For the batch that it would join: by its own target or that of a request that runs there,
        whatever is less. None on an idle worker."""
        promises = self._promises.get(ticket.decode)
        if promises is None:
            return math.inf
        own_s = ticket.promised_itl_s
        target_s = min(math.inf if own_s is None else own_s, *promises.itl_targets, math.inf)
        return target_s * ratio - self.itl_margin.of(target_s)
