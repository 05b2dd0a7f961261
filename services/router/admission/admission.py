"""Whether a request may start, must wait, or is sent away. A plain state machine, one per model.

    arrive ──► nobody waits and it fits ──────────────────────────► ADMITTED ──► end
       │                                      pump: its turn, fits ─────▲
       ├──► WAITING in the fair queue ────────┤
       │                                      └ hopeless, pushed out ──► REFUSED + Retry-After
       └──► its turn would come too late ───────────────────────────────▲

A request *fits* when the placement made now is predicted to keep its targets and those of the
requests that run (`judge`), and its worker has at most `max_ahead_s` of other prefill work before
it: what waits longer waits here, where fairness rules.

Whoever is let wait is as good as certain of its turn by what is known then (`pace`). With every
look at the queue all that wait are judged again, so that one whose turn has come out of reach is
told at once and not when its time is up.

Source: early rejection on predicted load after "Mooncake: A KVCache-centric Disaggregated
Architecture for LLM Serving", section 7.

Does not know: clocks, asyncio, what a placement is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.judge import ADMIT, WAIT, Judge, Judgement, Verdict
from services.router.admission.pace import Pace
from services.router.admission.request_cost import RequestCost
from services.router.admission.ticket import Prospect, Refusal, Ticket, TicketState
from services.router.admission.waiting_room import WaitingRoom

MAX_GRANTS = 32
"""Of one pump, so that streams are not kept waiting by placements."""
MAX_HEADS = 4
"""Tenants asked when the first one's request cannot go now."""
MAX_PASSED_S = 0.5
"""A request whose turn it is and that cannot go is passed by others for so long; then they wait
until it fits."""

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
        self._room = WaitingRoom(config, worker_wait_s=worker_wait_s)
        self.queue = self._room.queue
        self._pace = Pace(max_retry_after_s=config.max_retry_after_s)
        self._judge = Judge(
            max_ahead_s=max_ahead_s, shed_ratio=config.shed_ratio, calm_s=config.calm_s
        )
        self.cost = RequestCost(config)

    # A request's way.

    def arrive(self, ticket: Ticket, prospect: Prospect | None, now_s: float) -> list[Ticket]:
        """Take `ticket` on. Its state says what became of it; returns all that were refused.

        `prospect`: of a placement made now; None when there is no worker for it. An ADMITTED
        ticket must be launched before anything else is asked of the lane.
        """
        assert ticket.state is TicketState.NEW
        ticket.num_output_tokens = self.cost.expected_output(ticket.num_output_tokens)
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

    def pump(
        self,
        now_s: float,
        prospect_of: ProspectOf,
        launch: Launch,
        *,
        news_at_s: float | None = None,
    ) -> Pumped:
        """Let go whoever may go now, in the order of fairness, and send away those whose turn can
        no longer come in time.

        `launch` must make the ticket's work visible to the next `prospect_of`. `news_at_s`: when
        what the prospects say became known; now where it is None.
        """
        refused: list[Ticket] = []
        news_at_s = now_s if news_at_s is None else news_at_s
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
                self._give_up(ticket, judgement.reason, judgement.excess_s, news_at_s, now_s)
                refused.append(ticket)
        else:
            return Pumped(refused, has_more=bool(self.queue))
        refused += self._refuse_hopeless(news_at_s, now_s)
        self._pace.set_backlogged(bool(self.queue), now_s)
        return Pumped(refused, has_more=False)

    def expire(self, now_s: float) -> list[Ticket]:
        """Refuse those for whom it has become pointless to wait."""
        refused = self._room.due(now_s)
        for ticket in refused:
            is_alone = not math.isnan(ticket.no_worker_since_s)
            reason = Refusal.NO_WORKER if is_alone else ticket.wait_reason or Refusal.LATE
            excess_s = self._pace.drain_s(self.queue.queued_tokens, now_s)
            self._give_up(ticket, reason, excess_s, ticket.check_at_s, now_s)
        self._pace.set_backlogged(bool(self.queue), now_s)
        return refused

    @property
    def next_check_at_s(self) -> float | None:
        """When `expire` is due; None while there is nothing to expire."""
        return self._room.next_check_at_s

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """The client of a waiting request has gone."""
        if ticket.state is TicketState.WAITING:
            self.queue.remove(ticket)
            self._pace.set_backlogged(bool(self.queue), now_s)
        if ticket.state in (TicketState.NEW, TicketState.WAITING):
            ticket.state = TicketState.LEFT

    def end(self, ticket: Ticket, *, num_uncached_tokens: int, num_output_tokens: int) -> float:
        """An admitted request is over: charge its tenant what it has really used, which is
        returned."""
        assert ticket.state is TicketState.ADMITTED
        ticket.state = TicketState.ENDED
        self._judge.ended(ticket)
        used = self.cost.tokens(num_uncached_tokens, ticket.num_prompt_tokens, num_output_tokens)
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
            self.cost.learn(num_output_tokens)
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
        return self._room.by_class(now_s)

    def check_integrity(self) -> None:
        """Raises AssertionError on a state that must not exist."""
        self._room.check_integrity()
        self._judge.check_integrity()

    # Inside.

    def _judge_arrival(self, ticket: Ticket, prospect: Prospect, now_s: float) -> Judgement:
        if prospect.predicted is None:
            return WAIT if self.queue else ADMIT
        self._expect(ticket, prospect)
        judgement = self._judge.judge(ticket, prospect, now_s, is_arriving=True)
        if judgement.verdict is Verdict.ADMIT and not self.queue:
            return judgement
        if judgement.verdict is Verdict.REJECT:
            return judgement
        if judgement.verdict is Verdict.WAIT:
            self._pace.held_up(judgement.num_over, now_s, has_backlog=bool(self.queue))
        if ticket.targets.ttft_s is None:
            return Judgement(Verdict.WAIT, judgement.reason)
        # Places come free one after the other: its own comes after those of all before it.
        wait_s = self._pace.surely_within_s(self._room.turn_of(ticket), now_s)
        then = self._judge.judge(ticket, prospect, now_s, wait_s=wait_s, is_arriving=True)
        if then.verdict is not Verdict.REJECT:
            return Judgement(Verdict.WAIT, judgement.reason)
        reason = Refusal.ITL if self._pace.is_for_places else Refusal.TTFT
        return then._replace(reason=reason)

    def _expect(self, ticket: Ticket, prospect: Prospect) -> None:
        """One prompt after the other on each worker; a place for each sequence that ends."""
        predicted = prospect.predicted
        if predicted is None:
            return
        own_s = max(1e-4, predicted.ttft_s - predicted.queued_s)
        self._pace.expect(
            prompts_per_s=prospect.num_workers / own_s,
            places_per_s=prospect.places_per_s,
            num_decoding=prospect.num_decoding,
            cost_tokens=ticket.cost_tokens,
        )

    def _refuse_hopeless(self, news_at_s: float, now_s: float) -> list[Ticket]:
        hopeless = [
            ticket
            for ticket, turn in self._room.turns()
            if self._pace.is_hopeless(turn, self._judge.latest_start_s(ticket) - now_s, now_s)
        ]
        for ticket in hopeless:
            reason = Refusal.ITL if self._pace.is_for_places else Refusal.LATE
            excess_s = self._pace.drain_s(self.queue.queued_tokens, now_s)
            self._give_up(ticket, ticket.wait_reason or reason, excess_s, news_at_s, now_s)
        return hopeless

    def _next(self, now_s: float, prospect_of: ProspectOf) -> tuple[Ticket | None, Judgement]:
        """The next request to leave the queue, with its verdict; none when all must wait."""
        for ticket in list(islice(self.queue.heads(), MAX_HEADS)):
            prospect = prospect_of(ticket)
            if prospect is None:
                self._room.await_worker(ticket, now_s)
                continue
            if not math.isnan(ticket.no_worker_since_s):
                self._room.watch(ticket, self._judge.latest_start_s(ticket), now_s)
            self._price(ticket, prospect)
            judgement = ADMIT
            if prospect.predicted is not None:
                self._expect(ticket, prospect)
                judgement = self._judge.judge(ticket, prospect, now_s)
            if judgement.verdict is not Verdict.WAIT:
                return ticket, judgement
            ticket.wait_reason = judgement.reason
            self._pace.held_up(judgement.num_over, now_s, has_backlog=True)
            if math.isnan(ticket.blocked_since_s):
                ticket.blocked_since_s = now_s
            elif now_s - ticket.blocked_since_s > MAX_PASSED_S:
                break
        return None, WAIT

    def _enqueue(self, ticket: Ticket, prospect: Prospect | None, now_s: float) -> list[Ticket]:
        queued_before = self.queue.queued_tokens
        pushed_out = self._room.enter(ticket, now_s)
        for victim in pushed_out:
            reason = Refusal.QUEUE_FULL if victim is ticket else Refusal.PUSHED_OUT
            over_tokens = max(victim.cost_tokens, queued_before - self._config.max_queued_tokens)
            self._refuse(victim, reason, self._pace.drain_s(over_tokens, now_s), now_s)
        self._pace.set_backlogged(bool(self.queue), now_s)
        if ticket.state is TicketState.WAITING:
            if prospect is None:
                self._room.await_worker(ticket, now_s)
            else:
                self._room.watch(ticket, self._judge.latest_start_s(ticket), now_s)
        return pushed_out

    def _price(self, ticket: Ticket, prospect: Prospect | None) -> None:
        num_prompt = ticket.num_prompt_tokens
        num_uncached = num_prompt if prospect is None else prospect.num_uncached_tokens
        ticket.num_uncached_tokens = num_uncached
        cost = self.cost.tokens(num_uncached, num_prompt, ticket.num_output_tokens)
        self.queue.reprice(ticket, cost)

    def _admit(self, ticket: Ticket, now_s: float) -> None:
        ticket.state, ticket.admitted_at_s = TicketState.ADMITTED, now_s
        self._pace.taken(ticket.cost_tokens, now_s)
        self._judge.started(ticket)

    def _give_up(
        self, ticket: Ticket, reason: Refusal, excess_s: float, since_s: float, now_s: float
    ) -> None:
        """Send away one that waits; its turn could not come in time since `since_s`."""
        self.queue.remove(ticket)
        ticket.unreachable_at_s = since_s
        self._refuse(ticket, reason, excess_s, now_s)

    def _refuse(self, ticket: Ticket, reason: Refusal, excess_s: float, now_s: float) -> None:
        ticket.state, ticket.refusal = TicketState.REFUSED, reason
        if reason is Refusal.NO_WORKER:
            return
        self._judge.shed(now_s)
        ticket.retry_after_s = self._pace.retry_after_s(excess_s, ticket.cost_tokens, now_s)
