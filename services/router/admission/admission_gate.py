"""Admission with a clock and workers: what the dispatcher awaits before its first placement.

    enter ──► nobody waits, it fits: placed and submitted before it returns
       │
       └──► waits; woken by a worker's load report, the end of a request, a worker that comes
            └─► placed and submitted in the turn of the event loop that lets it go

Waiting requests are looked at when something has changed, at most every `MIN_PUMP_GAP_S`, and for
safety every `MAX_PUMP_GAP_S`. Replays after a failure do not come here again.

Does not know: how a decision is made (`admission`), how a placement is (`placer`), what it would
come to (`foresight`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import BatonError, NoWorker, Overloaded, WorkerLost
from baton.core.worker_info import WorkerId
from services.router.admission.admission import Lane
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.admission_record import AdmissionRecorder
from services.router.admission.foresight import Foresight, Running
from services.router.admission.request_outcome import new_ticket, outcome_of
from services.router.admission.slo_config import SloConfig
from services.router.admission.ticket import Prospect, Refusal, Ticket, TicketState
from services.router.edge.refusals import refusal_message
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement
from services.router.requests.flight import Flight
from services.router.requests.step_gap import Decoding

logger = logging.getLogger(__name__)

MIN_PUMP_GAP_S = 0.005
"""Between two looks at the queue, however often loads are reported."""
MAX_PUMP_GAP_S = 0.25

Choose = Callable[[Flight], Placement]
Start = Callable[[Flight, Placement], object]


@dataclass(slots=True, eq=False)
class _Entrant:
    """What belongs to a ticket outside the state machine. A `Sequence` of the forecast."""

    flight: Flight
    lane: Lane
    placement: Placement | None = None
    """Of the last look at it."""
    no_worker: NoWorker | None = None
    """Instead of a placement."""
    waiter: asyncio.Future[None] | None = None
    """While it waits; also for a moment after it has been told."""
    running: Running | None = None
    """In the forecast."""

    @property
    def num_prompt_tokens(self) -> int:
        return self.flight.record.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.flight.record.num_output_tokens

    @property
    def max_output_tokens(self) -> int:
        return self.flight.request.sampling.max_tokens


class AdmissionGate:
    """One per router; everything on one event loop."""

    def __init__(
        self,
        *,
        choose: Choose,
        start: Start,
        perf: PerfModel,
        decoding: Callable[[WorkerId], Decoding | None],
        num_computing: Callable[[str], int],
        config: AdmissionConfig,
        slo: SloConfig,
        worker_wait_s: float,
        recorder: AdmissionRecorder,
        wall_clock: Callable[[], float],
    ) -> None:
        """`choose` raises NoWorker; `start` submits the flight and raises WorkerLost.
        `decoding`: what a worker decodes now. `num_computing`: workers that compute prompts of a
        model."""
        self._choose, self._submit = choose, start
        self._foresight = Foresight(
            perf,
            decoding=decoding,
            num_computing=num_computing,
            expected_output_tokens=config.expected_output_tokens,
        )
        self._config, self._slo = config, slo
        self._worker_wait_s = worker_wait_s
        self._recorder = recorder
        self._wall_clock = wall_clock
        self._lanes: dict[str, Lane] = {}
        self._entrants: dict[Ticket, _Entrant] = {}
        self.num_waiting = 0
        self._asked: Ticket | None = None
        """The one that is being looked at."""
        self._pump_timer: asyncio.TimerHandle | None = None
        self._pump_at_s = 0.0
        self._pumped_at_s = 0.0
        self._news_at_s: float | None = None
        """When something changed first since the last look."""

    async def enter(self, flight: Flight) -> None:
        """Returns when the request may start; its attempt may have been started by then.

        Raises Overloaded, NoWorker, or what `abort` was given.
        """
        now_s = asyncio.get_running_loop().time()
        lane = self._lane(flight.request.model)
        ticket = flight.ticket = self._ticket(flight, now_s)
        entrant = self._entrants[ticket] = _Entrant(flight, lane)
        self._recorder.arrived()
        refused = lane.arrive(ticket, self._prospect(ticket), now_s)
        if ticket.state is TicketState.ADMITTED:
            self._start(ticket)
        self._tell_refused(refused, now_s)
        if ticket.state is TicketState.WAITING:
            await self._wait(entrant)
        if ticket.state is TicketState.REFUSED:
            raise self._refusal(ticket, entrant)

    def leave(self, flight: Flight) -> None:
        """The request is over, however it ended; also before it could start."""
        ticket = flight.ticket
        entrant = None if ticket is None else self._entrants.pop(ticket, None)
        if ticket is None or entrant is None:
            return
        if entrant.running is not None:
            self._foresight.ended(entrant.running)
            # It names the entrant, and would keep the request until the next collection.
            entrant.running = None
        if ticket.state is TicketState.ADMITTED:
            self._end(ticket, flight, entrant.lane)
        else:
            entrant.lane.leave(ticket, asyncio.get_running_loop().time())
        self.poke()

    def abort(self, flight: Flight, error: BatonError) -> None:
        """End the waiting of a request, if it waits."""
        entrant = None if flight.ticket is None else self._entrants.get(flight.ticket)
        if entrant is not None and entrant.waiter is not None and not entrant.waiter.done():
            entrant.waiter.set_exception(error)

    def poke(self) -> None:
        """Something has changed that may let a waiting request go."""
        if not self.num_waiting:
            return
        if self._news_at_s is None:
            self._news_at_s = asyncio.get_running_loop().time()
        at_s = self._pumped_at_s + MIN_PUMP_GAP_S
        if self._pump_timer is None or at_s < self._pump_at_s:
            self._schedule(at_s)

    def update_gauges(self) -> None:
        now_s = asyncio.get_running_loop().time()
        self._recorder.update(self._lanes.values(), now_s)

    def check_integrity(self) -> None:
        """Raises AssertionError on a state that must not exist."""
        for lane in self._lanes.values():
            lane.check_integrity()
        entrants = self._entrants.values()
        assert self.num_waiting == sum(e.waiter is not None for e in entrants)
        assert sum(len(lane.queue) for lane in self._lanes.values()) <= self.num_waiting
        assert self._foresight.num_running == sum(e.running is not None for e in entrants)
        assert self.num_waiting or self._pump_timer is None

    # Waiting.

    async def _wait(self, entrant: _Entrant) -> None:
        entrant.waiter = asyncio.get_running_loop().create_future()
        self.num_waiting += 1
        self.poke()
        try:
            await entrant.waiter
        finally:
            entrant.waiter = None
            self.num_waiting -= 1
            if not self.num_waiting and self._pump_timer is not None:
                self._pump_timer.cancel()
                self._pump_timer = None

    def _schedule(self, at_s: float) -> None:
        if self._pump_timer is not None:
            self._pump_timer.cancel()
        loop = asyncio.get_running_loop()
        self._pump_at_s = max(at_s, loop.time())
        self._pump_timer = loop.call_at(self._pump_at_s, self._pump)

    def _pump(self) -> None:
        self._pump_timer = None
        now_s = asyncio.get_running_loop().time()
        next_at_s = now_s + MAX_PUMP_GAP_S
        for lane in self._lanes.values():
            next_at_s = min(next_at_s, self._pump_lane(lane, now_s))
        self._pumped_at_s, self._news_at_s = now_s, None
        if self.num_waiting:
            self._schedule(next_at_s)

    def _pump_lane(self, lane: Lane, now_s: float) -> float:
        """When to come back at the latest."""
        self._tell_refused(lane.expire(now_s), now_s)
        try:
            pumped = lane.pump(now_s, self._prospect, self._start, news_at_s=self._news_at_s)
        except Exception as error:
            # One request that cannot even be looked at must not hold up all others, nor keep from
            # those refused in the same look that they are.
            self._give_up_on_asked(error, now_s)
            self._tell_refused(self._untold(), now_s)
            return now_s + MIN_PUMP_GAP_S
        self._tell_refused(pumped.refused, now_s)
        return now_s if pumped.has_more else lane.next_check_at_s or math.inf

    def _give_up_on_asked(self, error: Exception, now_s: float) -> None:
        """Its client gets `error`."""
        ticket = self._asked
        entrant = None if ticket is None else self._entrants.get(ticket)
        if ticket is None or entrant is None:
            logger.error("admission failed", exc_info=error)
            return
        if ticket.state is TicketState.WAITING:
            entrant.lane.leave(ticket, now_s)
        if entrant.waiter is not None and not entrant.waiter.done():
            entrant.waiter.set_exception(error)

    def _start(self, ticket: Ticket) -> None:
        """Admitted just now, by the placement its prospect was made from."""
        entrant = self._entrants[ticket]
        placement, waiter = entrant.placement, entrant.waiter
        assert placement is not None
        self._recorder.admitted(ticket)
        if waiter is not None and waiter.done():
            # Aborted or cancelled in this turn of the loop; it is about to leave.
            return
        if placement.predicted is not None and placement.decode is not None:
            model = entrant.flight.request.model
            entrant.running = self._foresight.started(model, placement.decode, entrant)
        # Without a worker it has its turn all the same: the dispatcher looks for another one.
        with contextlib.suppress(WorkerLost):
            self._submit(entrant.flight, placement)
        if waiter is not None:
            waiter.set_result(None)

    def _tell_refused(self, refused: list[Ticket], now_s: float) -> None:
        for ticket in refused:
            self._recorder.refused(ticket, now_s)
            waiter = self._entrants[ticket].waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _untold(self) -> list[Ticket]:
        """Refused, and still waiting to hear of it."""
        return [
            ticket
            for ticket, entrant in self._entrants.items()
            if ticket.state is TicketState.REFUSED
            and entrant.waiter is not None
            and not entrant.waiter.done()
        ]

    def _refusal(self, ticket: Ticket, entrant: _Entrant) -> BatonError:
        if ticket.refusal is Refusal.NO_WORKER and entrant.no_worker is not None:
            return entrant.no_worker
        return Overloaded(refusal_message(ticket), retry_after_s=ticket.retry_after_s)

    def _prospect(self, ticket: Ticket) -> Prospect | None:
        entrant, self._asked = self._entrants[ticket], ticket
        try:
            placement = self._choose(entrant.flight)
        except NoWorker as error:
            entrant.no_worker, entrant.placement = error, None
            return None
        entrant.no_worker, entrant.placement = None, placement
        now_s = asyncio.get_running_loop().time()
        return self._foresight.prospect(entrant.flight.request.model, ticket, placement, now_s)

    # A request's beginning and end.

    def _ticket(self, flight: Flight, now_s: float) -> Ticket:
        arrived_at_s = flight.request.arrived_at_s
        age_s = max(0.0, self._wall_clock() - arrived_at_s) if arrived_at_s else 0.0
        return new_ticket(
            flight.request,
            self._slo,
            arrived_at_s=now_s - age_s,
            deadline_at_s=flight.deadline_at_s,
        )

    def _lane(self, model: str) -> Lane:
        lane = self._lanes.get(model)
        if lane is None:
            tightest_s = [c.ttft_s for c in self._slo.classes.values() if c.ttft_s is not None]
            lane = self._lanes[model] = Lane(
                self._config,
                max_ahead_s=min([self._config.max_ahead_s, *(s / 2 for s in tightest_s)]),
                worker_wait_s=self._worker_wait_s,
            )
        return lane

    def _end(self, ticket: Ticket, flight: Flight, lane: Lane) -> None:
        record = flight.record
        outcome = outcome_of(record)
        num_uncached = ticket.num_uncached_tokens if record.placements else 0
        if record.num_cached_tokens is not None:
            num_uncached = ticket.num_prompt_tokens - record.num_cached_tokens
        work_tokens = lane.end(
            ticket,
            num_uncached_tokens=num_uncached,
            num_output_tokens=record.num_output_tokens,
        )
        lane.learn(
            ticket,
            ttft_s=None if record.failures else outcome.ttft_s,
            mean_itl_s=None if record.failures or record.migrations else outcome.mean_itl_s,
            num_output_tokens=record.num_output_tokens if outcome.is_whole else None,
        )
        self._recorder.ended(ticket, outcome, work_tokens=work_tokens)
