"""Whether a request may start, must wait, or is sent away. A plain state machine, one per model.

    arrive ──► nobody waits and it fits ──────────────────────────► ADMITTED ──► end
       │                                      pump: its turn, fits ─────▲
       ├──► WAITING in the fair queue ────────┤
       │                                      └ expire, pushed out ───► REFUSED + Retry-After
       └──► predicted too late ───────────────────────────────────────────▲

A request *fits* when the placement made now is predicted to keep its targets and those of the
requests that run (`judge`), and its worker has at most `max_ahead_s` of other prefill work before
it: what waits longer waits here, where fairness rules.

Source: early rejection on predicted load after "Mooncake: A KVCache-centric Disaggregated
Architecture for LLM Serving", section 7.

Does not know: clocks, asyncio, what a placement is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.drain import DrainMeter, RetryLedger
from services.router.admission.fair_queue import Bounds, FairQueue
from services.router.admission.judge import ADMIT, WAIT, Judge, Judgement, Verdict
from services.router.admission.ticket import Prospect, Refusal, Ticket, TicketState
from services.router.placement.placement import Prediction

MAX_GRANTS = 32
"""Of one pump, so that streams are not kept waiting by placements."""
MAX_HEADS = 4
"""Tenants asked when the first one's request cannot go now."""
MAX_PASSED_S = 0.5
"""A request whose turn it is and that cannot go is passed by others for so long; then they wait
until it fits."""
WAIT_RESERVE = 2.0
"""Times the mean of how long its turn takes to come: sequences end by chance, and whoever is let
wait shall not be sent away later."""
MIN_RETRY_AFTER_S = 0.1
OUTPUT_GAIN = 0.05
"""Of one request's output length in the mean that the next ones are expected to have."""
SPARE_CHECKS = 64

ProspectOf = Callable[[Ticket], Prospect | None]
Launch = Callable[[Ticket], None]


class Pumped(NamedTuple):
    refused: list[Ticket]
    has_more: bool
    """Stopped for its length; call again soon."""


class Lane:
    """The requests of one model. Times are seconds of one clock that never goes back."""

    def __init__(
        self, config: AdmissionConfig, *, max_ahead_s: float, worker_wait_s: float
    ) -> None:
        """`worker_wait_s`: how long a request waits for a worker to come that can take it."""
        self._config = config
        self._worker_wait_s = worker_wait_s
        self.queue: FairQueue[Ticket] = FairQueue(
            Bounds(
                config.max_queued_requests,
                config.max_queued_tokens,
                config.max_tenant_requests,
                config.max_tenant_tokens,
            ),
            quantum_tokens=config.quantum_tokens,
        )
        self._meters = {is_itl_bound: DrainMeter() for is_itl_bound in (False, True)}
        """Work leaves at another rate where decode batches hold it up than where prompts do."""
        self._is_itl_bound = False
        self._ledger = RetryLedger()
        self._checks: list[tuple[float, int, Ticket]] = []
        """When to look at waiting requests again; a heap with outdated entries."""
        self._num_checks = 0
        self._judge = Judge(
            max_ahead_s=max_ahead_s, shed_ratio=config.shed_ratio, calm_s=config.calm_s
        )
        self._output_tokens = float(config.expected_output_tokens)

    # A request's way.

    def cost_tokens(self, num_uncached: int, num_prompt: int, num_output: float) -> float:
        """Work of a request through both pools, in prompt tokens."""
        context = num_prompt + num_output / 2
        residency = 1 + context / self._config.residency_tokens
        return max(1.0, num_uncached + self._config.output_token_cost * num_output * residency)

    def arrive(self, ticket: Ticket, prospect: Prospect | None, now_s: float) -> list[Ticket]:
        """Take `ticket` on. Its state says what became of it; returns all that were refused.

        `prospect`: of a placement made now; None when there is no worker for it. An ADMITTED
        ticket must be launched before anything else is asked of the lane.
        """
        assert ticket.state is TicketState.NEW
        ticket.num_output_tokens = max(1, min(ticket.num_output_tokens, int(self._output_tokens)))
        self._price(ticket, prospect)
        if prospect is not None:
            judgement = self._judge_arrival(ticket, prospect, now_s)
            if judgement.verdict is Verdict.ADMIT:
                self._admit(ticket, now_s)
                return []
            ticket.wait_reason = judgement.reason
            if judgement.verdict is Verdict.REJECT:
                assert judgement.reason is not None
                self._refuse(ticket, judgement.reason, judgement.excess_s, now_s)
                return [ticket]
        return self._enqueue(ticket, prospect, now_s)

    def pump(self, now_s: float, prospect_of: ProspectOf, launch: Launch) -> Pumped:
        """Let go whoever may go now, in the order of fairness.

        `launch` must make the ticket's work visible to the next `prospect_of`.
        """
        refused: list[Ticket] = []
        for _ in range(MAX_GRANTS):
            ticket, judgement = self._next(now_s, prospect_of)
            if ticket is None:
                break
            if judgement.verdict is Verdict.ADMIT:
                self.queue.take(ticket)
                self._admit(ticket, now_s)
                launch(ticket)
            else:
                assert judgement.reason is not None
                self.queue.remove(ticket)
                self._refuse(ticket, judgement.reason, judgement.excess_s, now_s)
                refused.append(ticket)
        else:
            return Pumped(refused, has_more=bool(self.queue))
        self._meter.set_backlogged(bool(self.queue), now_s)
        return Pumped(refused, has_more=False)

    def expire(self, now_s: float) -> list[Ticket]:
        """Refuse those for whom it has become pointless to wait."""
        refused = []
        while self._checks and self._checks[0][0] <= now_s:
            check_at_s, _, ticket = heapq.heappop(self._checks)
            if ticket.state is not TicketState.WAITING or check_at_s != ticket.check_at_s:
                continue
            self.queue.remove(ticket)
            is_alone = not math.isnan(ticket.no_worker_since_s)
            reason = Refusal.NO_WORKER if is_alone else ticket.wait_reason or Refusal.LATE
            self._refuse(ticket, reason, self._drain_s(self.queue.queued_tokens, now_s), now_s)
            refused.append(ticket)
        self._meter.set_backlogged(bool(self.queue), now_s)
        return refused

    @property
    def next_check_at_s(self) -> float | None:
        """When `expire` is due; None while there is nothing to expire."""
        checks = self._checks
        while checks and (
            checks[0][2].state is not TicketState.WAITING or checks[0][0] != checks[0][2].check_at_s
        ):
            heapq.heappop(checks)
        return checks[0][0] if checks else None

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """The client of a waiting request has gone."""
        if ticket.state is TicketState.WAITING:
            self.queue.remove(ticket)
            self._meter.set_backlogged(bool(self.queue), now_s)
        if ticket.state in (TicketState.NEW, TicketState.WAITING):
            ticket.state = TicketState.LEFT

    def end(self, ticket: Ticket, *, num_uncached_tokens: int, num_output_tokens: int) -> float:
        """An admitted request is over: charge its tenant what it has really used, which is
        returned."""
        assert ticket.state is TicketState.ADMITTED
        ticket.state = TicketState.ENDED
        self._judge.ended(ticket)
        used = self.cost_tokens(num_uncached_tokens, ticket.num_prompt_tokens, num_output_tokens)
        self.queue.settle(ticket.tenant, used - ticket.cost_tokens)
        return used

    def learn(
        self,
        ticket: Ticket,
        *,
        ttft_s: float | None,
        mean_itl_s: float | None,
        num_output_tokens: int | None,
    ) -> None:
        """What an admitted request has measured; None: it did not get so far."""
        if num_output_tokens is not None:
            step = OUTPUT_GAIN * (num_output_tokens - self._output_tokens)
            self._output_tokens = max(1.0, self._output_tokens + step)
        self._judge.learn(ticket, ttft_s=ttft_s, mean_itl_s=mean_itl_s)

    # What is known.

    @property
    def num_admitted(self) -> int:
        """Admitted and not ended."""
        return self._judge.num_running

    @property
    def ttft_margin_s(self) -> float:
        return self._judge.ttft_margin.margin_s

    @property
    def itl_margin_s(self) -> float:
        return self._judge.itl_margin.margin_s

    def is_shedding(self, now_s: float) -> bool:
        """A request has been sent away lately."""
        return self._judge.is_shedding(now_s)

    def waiting_by_class(self, now_s: float) -> dict[str, tuple[int, float]]:
        """Number of waiting requests of each class and age of the oldest, in seconds."""
        waiting: dict[str, tuple[int, float]] = {}
        for ticket in self.queue:
            num_waiting, age_s = waiting.get(ticket.slo_class, (0, 0.0))
            age_s = max(age_s, now_s - ticket.arrived_at_s)
            waiting[ticket.slo_class] = (num_waiting + 1, age_s)
        return waiting

    def check_integrity(self) -> None:
        """Raises AssertionError on a state that must not exist."""
        self.queue.check_integrity()
        for ticket in self.queue:
            assert ticket.state is TicketState.WAITING
        self._judge.check_integrity()
        assert len(self._checks) <= 2 * self._config.max_queued_requests + SPARE_CHECKS

    # Inside.

    def _judge_arrival(self, ticket: Ticket, prospect: Prospect, now_s: float) -> Judgement:
        predicted = prospect.predicted
        if predicted is None:
            return WAIT if self.queue else ADMIT
        self._assume_rates(ticket, prospect.num_workers, predicted)
        alone_itl_s = prospect.alone_itl_s
        judgement = self._judge.judge(
            ticket, predicted, now_s, alone_itl_s=alone_itl_s, is_arriving=True
        )
        if judgement.verdict is Verdict.ADMIT and not self.queue:
            return judgement
        if judgement.verdict is Verdict.WAIT:
            self._set_bottleneck(judgement, now_s)
        if judgement.verdict is not Verdict.REJECT and ticket.targets.ttft_s is None:
            return Judgement(Verdict.WAIT, judgement.reason)
        if judgement.verdict is not Verdict.REJECT:
            # Places come free one after the other: its own comes after those of all before it.
            ahead_tokens = self.queue.tokens_ahead(ticket) + ticket.cost_tokens
            wait_s = WAIT_RESERVE * self._drain_s(ahead_tokens, now_s)
            reason = judgement.reason
            judgement = self._judge.judge(
                ticket,
                predicted,
                now_s,
                alone_itl_s=alone_itl_s,
                wait_s=wait_s,
                is_arriving=True,
            )
            if judgement.verdict is not Verdict.REJECT:
                return Judgement(Verdict.WAIT, reason)
        return judgement

    def _assume_rates(self, ticket: Ticket, num_workers: int, predicted: Prediction) -> None:
        """Before anything was measured: one prompt after the other on each worker; sequences that
        end after as many steps as are expected of them."""
        own_s = max(1e-4, predicted.ttft_s - predicted.queued_s)
        self._meters[False].assume(num_workers * ticket.cost_tokens / own_s)
        decode_s = max(1e-4, self._output_tokens * predicted.itl_s)
        self._meters[True].assume(max(1, self.num_admitted) * ticket.cost_tokens / decode_s)

    def _set_bottleneck(self, judgement: Judgement, now_s: float) -> None:
        is_itl_bound = judgement.reason is Refusal.ITL
        if is_itl_bound is not self._is_itl_bound:
            self._meter.stop(now_s)
            self._is_itl_bound = is_itl_bound
            self._meter.set_backlogged(bool(self.queue), now_s)

    @property
    def _meter(self) -> DrainMeter:
        """Of what holds requests up now."""
        return self._meters[self._is_itl_bound]

    def _next(self, now_s: float, prospect_of: ProspectOf) -> tuple[Ticket | None, Judgement]:
        """The next request to leave the queue, with its verdict; none when all must wait."""
        for ticket in list(islice(self.queue.heads(), MAX_HEADS)):
            prospect = prospect_of(ticket)
            if prospect is None:
                self._await_worker(ticket, now_s)
                continue
            if not math.isnan(ticket.no_worker_since_s):
                ticket.no_worker_since_s = math.nan
                self._schedule_check(ticket, now_s)
            self._price(ticket, prospect)
            judgement = ADMIT
            if prospect.predicted is not None:
                judgement = self._judge.judge(
                    ticket, prospect.predicted, now_s, alone_itl_s=prospect.alone_itl_s
                )
            if judgement.verdict is not Verdict.WAIT:
                return ticket, judgement
            ticket.wait_reason = judgement.reason
            self._set_bottleneck(judgement, now_s)
            if math.isnan(ticket.blocked_since_s):
                ticket.blocked_since_s = now_s
            elif now_s - ticket.blocked_since_s > MAX_PASSED_S:
                break
        return None, WAIT

    def _enqueue(self, ticket: Ticket, prospect: Prospect | None, now_s: float) -> list[Ticket]:
        queued_before = self.queue.queued_tokens
        ticket.state, ticket.wait_started_at_s = TicketState.WAITING, now_s
        pushed_out = self.queue.push(ticket)
        for victim in pushed_out:
            reason = Refusal.QUEUE_FULL if victim is ticket else Refusal.PUSHED_OUT
            over_tokens = max(victim.cost_tokens, queued_before - self._config.max_queued_tokens)
            self._refuse(victim, reason, self._drain_s(over_tokens, now_s), now_s)
        self._meter.set_backlogged(bool(self.queue), now_s)
        if ticket.state is TicketState.WAITING:
            if prospect is None:
                self._await_worker(ticket, now_s)
            else:
                self._schedule_check(ticket, now_s)
        return pushed_out

    def _price(self, ticket: Ticket, prospect: Prospect | None) -> None:
        num_prompt = ticket.num_prompt_tokens
        num_uncached = num_prompt if prospect is None else prospect.num_uncached_tokens
        ticket.num_uncached_tokens = num_uncached
        cost = self.cost_tokens(num_uncached, num_prompt, ticket.num_output_tokens)
        self.queue.reprice(ticket, cost)

    def _admit(self, ticket: Ticket, now_s: float) -> None:
        ticket.state, ticket.admitted_at_s = TicketState.ADMITTED, now_s
        self._meter.taken(ticket.cost_tokens, now_s)
        self._judge.started(ticket)

    def _refuse(self, ticket: Ticket, reason: Refusal, excess_s: float, now_s: float) -> None:
        ticket.state, ticket.refusal = TicketState.REFUSED, reason
        if reason is Refusal.NO_WORKER:
            return
        self._judge.shed(now_s)
        self._meter.refused(now_s)
        promised_s = self._drain_s(self._ledger.outstanding_tokens(now_s), now_s)
        retry_after_s = max(MIN_RETRY_AFTER_S, excess_s + promised_s)
        ticket.retry_after_s = min(retry_after_s, self._config.max_retry_after_s)
        self._ledger.promise(now_s + ticket.retry_after_s, ticket.cost_tokens)

    def _drain_s(self, tokens: float, now_s: float) -> float:
        """How long so much work takes to leave the queue; 0 while nothing is known."""
        rate = self._meter.tokens_per_s(now_s)
        if rate is None:
            return 0.0
        return tokens / rate if rate * 1e6 > tokens else 1e6

    def _await_worker(self, ticket: Ticket, now_s: float) -> None:
        if math.isnan(ticket.no_worker_since_s):
            ticket.no_worker_since_s = now_s
            self._schedule_check(ticket, now_s)

    def _schedule_check(self, ticket: Ticket, now_s: float) -> None:
        """When waiting any longer becomes pointless."""
        if not math.isnan(ticket.no_worker_since_s):
            ticket.check_at_s = ticket.no_worker_since_s + self._worker_wait_s
        elif ticket.targets.ttft_s is not None:
            latest_s = ticket.arrived_at_s + ticket.targets.ttft_s - ticket.own_s
            ticket.check_at_s = max(now_s, latest_s)
        else:
            ticket.check_at_s = math.inf
            return
        self._num_checks += 1
        heapq.heappush(self._checks, (ticket.check_at_s, self._num_checks, ticket))
        if len(self._checks) > 2 * len(self.queue) + SPARE_CHECKS:
            self._checks = [
                c
                for c in self._checks
                if c[0] == c[2].check_at_s and c[2].state is TicketState.WAITING
            ]
            heapq.heapify(self._checks)
