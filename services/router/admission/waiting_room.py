"""Requests that wait: in whose order, behind how much, and until when.

    enter ─► watched until its latest start, or until its wait for a worker is over ─► take, remove

Does not know: why somebody waits, how fast the others go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.checks import SPARE, Checks
from services.router.admission.fair_queue import Bounds, FairQueue
from services.router.admission.pace import Turn
from services.router.admission.ticket import Ticket, TicketState

MAX_JUDGED_ANEW = 256
"""Waiting requests at a time; the ring of tenants turns, so others come next time."""


class WaitingRoom:
    """Of one lane."""

    def __init__(self, config: AdmissionConfig, *, worker_wait_s: float) -> None:
        """`worker_wait_s`: how long a request waits for a worker to come that can take it."""
        self._max_queued_requests = config.max_queued_requests
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
        self._checks = Checks()

    def enter(self, ticket: Ticket, now_s: float) -> list[Ticket]:
        """It waits, or is among those returned, for whom there is no room."""
        ticket.state, ticket.wait_started_at_s = TicketState.WAITING, now_s
        return self.queue.push(ticket)

    def watch(self, ticket: Ticket, latest_start_s: float, now_s: float) -> None:
        """There is a worker for it: it may wait until then."""
        ticket.no_worker_since_s = math.nan
        self._check_at(ticket, max(now_s, latest_start_s))

    def await_worker(self, ticket: Ticket, now_s: float) -> None:
        """There is none: it may wait for one from now on, or from when it has begun to."""
        if math.isnan(ticket.no_worker_since_s):
            ticket.no_worker_since_s = now_s
            self._check_at(ticket, now_s + self._worker_wait_s)

    def due(self, now_s: float) -> list[Ticket]:
        """Those that have waited as long as they may. To be removed before anything else."""
        return self._checks.due(now_s)

    @property
    def next_check_at_s(self) -> float | None:
        """When somebody is due; None while nobody ever is."""
        return self._checks.next_at_s

    def turn_of(self, ticket: Ticket) -> Turn:
        """Of one that waits, or might."""
        return self._turn(ticket, self.queue.tokens_ahead(ticket))

    def turns(self) -> Iterator[tuple[Ticket, Turn]]:
        """Of those that wait for their turn and have a target. Nothing may come or go meanwhile."""
        for ticket, ahead_tokens in islice(self.queue.outlook(), MAX_JUDGED_ANEW):
            if ticket.targets.ttft_s is not None and math.isnan(ticket.no_worker_since_s):
                yield ticket, self._turn(ticket, ahead_tokens)

    def by_class(self, now_s: float) -> dict[str, tuple[int, float]]:
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
        assert len(self._checks) <= 2 * self._max_queued_requests + SPARE

    def _turn(self, ticket: Ticket, ahead_tokens: float) -> Turn:
        num_ahead = 0.0
        if self.queue:
            num_ahead = ahead_tokens * len(self.queue) / self.queue.queued_tokens
        return Turn(ahead_tokens + ticket.cost_tokens, num_ahead + 1.0)

    def _check_at(self, ticket: Ticket, at_s: float) -> None:
        ticket.check_at_s = at_s
        if at_s < math.inf:
            self._checks.add(ticket, at_s, num_waiting=len(self.queue))
