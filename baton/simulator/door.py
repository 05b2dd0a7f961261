"""Admission in front of one simulated router copy: the state machine and the forecast as they are.

    enter ─► placed at once, or waits ─► looked at after each step of a worker ─► placed, or refused

Does not know: how a placement runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import NoWorker
from baton.simulator.cluster_config import ClusterConfig
from baton.simulator.events import EventQueue
from baton.simulator.outcome import Outcome
from baton.simulator.router import MODEL, SimRouter
from baton.simulator.workload import Arrival
from services.router.admission.admission import Lane
from services.router.admission.foresight import Foresight, Running
from services.router.admission.ticket import Prospect, Ticket, TicketState
from services.router.placement.placement import Placement

MAX_LOOK_GAP_S = 0.05
"""While requests wait."""
MAX_AHEAD_SHARE = 0.5
"""Of the TTFT target, as in the router's own gate."""
WORKER_WAIT_S = 1.0

Start = Callable[["Visitor", Placement], None]


@dataclass(slots=True, eq=False)
class Visitor:
    """One request and its way out; a `Sequence` of the forecast."""

    arrival: Arrival
    outcome: Outcome
    router: SimRouter
    door: Door | None = None
    ticket: Ticket | None = None
    placement: Placement | None = None
    running: Running | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return self.arrival.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.outcome.num_output_tokens

    @property
    def max_output_tokens(self) -> int:
        return self.arrival.max_output_tokens or self.arrival.num_output_tokens

    def leave(self) -> None:
        """It has ended."""
        if self.door is not None:
            self.door.left(self)


class Door:
    """Of one copy. `start` runs a placement."""

    def __init__(
        self, router: SimRouter, events: EventQueue, config: ClusterConfig, *, start: Start
    ) -> None:
        self._router, self._events, self._start_placement = router, events, start
        self._max_concurrent = config.max_concurrent
        self._num_inside = 0
        self._lane: Lane | None = None
        self.max_queued = 0
        if config.admission is not None:
            self._lane = Lane(
                config.admission,
                max_ahead_s=config.admission.max_ahead_s,
                worker_wait_s=WORKER_WAIT_S,
            )
            self._foresight = Foresight(
                router.perf,
                decoding=lambda worker_id: router.decoding(worker_id, events.now()),
                num_computing=lambda model: router.num_computing(),
                expected_output_tokens=config.admission.expected_output_tokens,
            )
        self._visitors: dict[Ticket, Visitor] = {}
        self._unplaced: deque[Visitor] = deque()
        self._is_looking = False

    def enter(self, visitor: Visitor) -> None:
        """It is started, waits, or its outcome says when it was refused."""
        visitor.door = self
        if self._max_concurrent is not None and self._num_inside >= self._max_concurrent:
            visitor.outcome.refused_s = self._events.now()
            return
        if self._lane is None:
            self._unplaced.append(visitor)
            self._place_waiting()
            return
        ticket = visitor.ticket = self._ticket(visitor)
        self._visitors[ticket] = visitor
        refused = self._lane.arrive(ticket, self._prospect(ticket), self._events.now())
        if ticket.state is TicketState.ADMITTED:
            self._launch(ticket)
        self._refuse(refused)
        self._look_later()

    def look(self) -> None:
        """Something has changed on a worker."""
        if self._unplaced:
            self._place_waiting()
        if self._lane is None or not self._lane.queue:
            return
        now_s = self._events.now()
        self._refuse(self._lane.expire(now_s))
        self._refuse(self._lane.pump(now_s, self._prospect, self._launch).refused)
        self._look_later()

    def left(self, visitor: Visitor) -> None:
        """An admitted request has ended."""
        self._num_inside -= 1
        ticket, outcome = visitor.ticket, visitor.outcome
        if self._lane is None or ticket is None:
            return
        del self._visitors[ticket]
        if visitor.running is not None:
            self._foresight.ended(visitor.running)
        num_uncached = outcome.num_prompt_tokens - outcome.num_cached_tokens
        num_output = outcome.num_output_tokens
        self._lane.end(ticket, num_uncached_tokens=num_uncached, num_output_tokens=num_output)
        self._lane.learn(
            ticket, ttft_s=outcome.ttft_s, mean_itl_s=outcome.itl_s, num_output_tokens=num_output
        )

    def check_idle(self) -> None:
        """Raises AssertionError when somebody is left."""
        assert not self._unplaced, f"{len(self._unplaced)} requests never found a worker"
        assert not self._num_inside and not self._visitors
        if self._lane is not None:
            self._lane.check_integrity()
            assert not self._lane.queue and not self._lane.num_admitted
            assert not self._foresight.num_running

    def _ticket(self, visitor: Visitor) -> Ticket:
        arrival = visitor.arrival
        ttft_s = arrival.targets.ttft_s
        return Ticket(
            arrival.tenant,
            1.0,
            due_at_s=arrival.at_s + (1e6 if ttft_s is None else ttft_s),
            targets=arrival.targets,
            arrived_at_s=arrival.at_s,
            num_prompt_tokens=arrival.num_prompt_tokens,
            num_output_tokens=visitor.max_output_tokens,
        )

    def _place(self, visitor: Visitor) -> Placement:
        arrival = visitor.arrival
        return self._router.place(
            arrival.block_hashes,
            num_prompt_tokens=arrival.num_prompt_tokens,
            max_tokens=visitor.max_output_tokens,
            session_key=arrival.session_key,
            now_s=self._events.now(),
        )

    def _place_waiting(self) -> None:
        """Without admission, who finds no worker waits for one to come."""
        while self._unplaced:
            try:
                placement = self._place(self._unplaced[0])
            except NoWorker:
                return
            self._num_inside += 1
            self._start_placement(self._unplaced.popleft(), placement)

    def _prospect(self, ticket: Ticket) -> Prospect | None:
        visitor = self._visitors[ticket]
        try:
            placement = visitor.placement = self._place(visitor)
        except NoWorker:
            return None
        return self._foresight.prospect(MODEL, ticket, placement, self._events.now())

    def _launch(self, ticket: Ticket) -> None:
        visitor = self._visitors[ticket]
        placement = visitor.placement
        assert placement is not None
        self._num_inside += 1
        if placement.predicted is not None and placement.decode is not None:
            visitor.running = self._foresight.started(MODEL, placement.decode, visitor)
        self._start_placement(visitor, placement)

    def _refuse(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            outcome = self._visitors.pop(ticket).outcome
            outcome.refused_s, outcome.retry_after_s = self._events.now(), ticket.retry_after_s

    def _look_later(self) -> None:
        assert self._lane is not None
        self.max_queued = max(self.max_queued, len(self._lane.queue))
        if self._lane.queue and not self._is_looking:
            self._is_looking = True
            self._events.after(MAX_LOOK_GAP_S, self._look_again)

    def _look_again(self) -> None:
        self._is_looking = False
        self.look()
