"""Admission with a clock and workers: what the dispatcher awaits before its first placement.

    enter ──► nobody waits, it fits: placed and submitted before it returns
       │
       └──► waits; woken by a worker's load report, the end of a request, a worker that comes
            └─► placed and submitted in the turn of the event loop that lets it go

Waiting requests are looked at when something has changed, at most every `MIN_PUMP_GAP_S`, and for
safety every `MAX_PUMP_GAP_S`. Replays after a failure do not come here again.

Does not know: how a decision is made (`admission`), how a placement is (`placer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from baton.core.errors import BatonError, NoWorker, Overloaded, WorkerLost
from baton.core.lifecycle import LifecycleEvent
from baton.core.request import FinishReason
from baton.core.worker_info import WorkerId
from services.router.admission.admission import Lane
from services.router.admission.admission_config import AdmissionConfig
from services.router.admission.admission_record import AdmissionRecorder
from services.router.admission.decode_forecast import DecodeForecast, Running
from services.router.admission.slo import SloResult, class_targets, result
from services.router.admission.slo_config import SloConfig
from services.router.admission.ticket import Prospect, Refusal, Ticket, TicketState
from services.router.edge.refusals import refusal_message
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement, Prediction
from services.router.requests.flight import Flight
from services.router.requests.request_log import RequestRecord
from services.router.requests.step_gap import Decoding

logger = logging.getLogger(__name__)

MIN_PUMP_GAP_S = 0.005
"""Between two looks at the queue, however often loads are reported."""
MAX_PUMP_GAP_S = 0.25
MAX_CORRECTION = 8.0
"""By which a worker's present speed goes before what is modelled of it."""

Choose = Callable[[Flight], Placement]
Start = Callable[[Flight, Placement], object]


@dataclass(slots=True, eq=False)
class _Entrant:
    """What belongs to a ticket outside the state machine."""

    flight: Flight
    lane: Lane
    placement: Placement | None = None
    """Of the last look at it."""
    no_worker: NoWorker | None = None
    """Instead of a placement."""
    waiter: asyncio.Future[None] | None = None
    """While it waits; also for a moment after it has been told."""
    decoding: tuple[WorkerId, Running] | None = None
    """In the forecast."""


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
        self._choose, self._submit, self._perf = choose, start, perf
        self._decoding_now, self._num_computing = decoding, num_computing
        self._config, self._slo = config, slo
        self._worker_wait_s = worker_wait_s
        self._recorder = recorder
        self._wall_clock = wall_clock
        self._lanes: dict[str, Lane] = {}
        self._entrants: dict[Ticket, _Entrant] = {}
        self.num_waiting = 0
        self._asked: Ticket | None = None
        """The one that is being looked at."""
        self._forecast = DecodeForecast()
        self._pump_timer: asyncio.TimerHandle | None = None
        self._pump_at_s = 0.0
        self._pumped_at_s = 0.0

    async def enter(self, flight: Flight) -> None:
        """Returns when the request may start; its attempt may have been started by then.

        Raises Overloaded, NoWorker, or what `abort` was given.
        """
        now_s = asyncio.get_running_loop().time()
        lane = self._lane(flight.request.model)
        ticket = flight.ticket = self._ticket(flight, now_s)
        entrant = self._entrants[ticket] = _Entrant(flight, lane)
        refused = lane.arrive(ticket, self._prospect(ticket), now_s)
        if ticket.state is TicketState.ADMITTED:
            self._start(ticket)
        self._tell_refused(refused)
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
        if entrant.decoding is not None:
            self._forecast.remove(*entrant.decoding)
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
        assert len(self._forecast) == sum(e.decoding is not None for e in entrants)
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
        self._pumped_at_s = now_s
        if self.num_waiting:
            self._schedule(next_at_s)

    def _pump_lane(self, lane: Lane, now_s: float) -> float:
        """When to come back at the latest."""
        self._tell_refused(lane.expire(now_s))
        try:
            pumped = lane.pump(now_s, self._prospect, self._start)
        except Exception as error:
            # One request that cannot even be looked at must not hold up all others.
            self._give_up_on_asked(error, now_s)
            return now_s + MIN_PUMP_GAP_S
        self._tell_refused(pumped.refused)
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
        self._foretell(ticket, entrant, placement)
        # Without a worker it has its turn all the same: the dispatcher looks for another one.
        with contextlib.suppress(WorkerLost):
            self._submit(entrant.flight, placement)
        if waiter is not None:
            waiter.set_result(None)

    def _tell_refused(self, refused: list[Ticket]) -> None:
        for ticket in refused:
            self._recorder.refused(ticket)
            waiter = self._entrants[ticket].waiter
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _refusal(self, ticket: Ticket, entrant: _Entrant) -> BatonError:
        if ticket.refusal is Refusal.NO_WORKER and entrant.no_worker is not None:
            return entrant.no_worker
        return Overloaded(refusal_message(ticket), retry_after_s=ticket.retry_after_s)

    # What is predicted.

    def _prospect(self, ticket: Ticket) -> Prospect | None:
        entrant, self._asked = self._entrants[ticket], ticket
        try:
            placement = self._choose(entrant.flight)
        except NoWorker as error:
            entrant.no_worker, entrant.placement = error, None
            return None
        entrant.no_worker, entrant.placement = None, placement
        uncached = placement.terms_of(placement.computes_prompt).uncached
        num_computing = max(1, self._num_computing(entrant.flight.request.model))
        alone_itl_s = self._alone_itl_s(ticket, placement)
        return Prospect(self._at_completion(placement), uncached, num_computing, alone_itl_s)

    def _alone_itl_s(self, ticket: Ticket, placement: Placement) -> float:
        worker_id = placement.decode
        if placement.predicted is None or worker_id is None or ticket.targets.itl_s is None:
            return 0.0
        role = placement.terms_of(worker_id).role
        return self._perf.itl_s(role, 1, ticket.num_prompt_tokens, worker_id)

    def _at_completion(self, placement: Placement) -> Prediction | None:
        """The prediction with the decode batch as it will be when the prompt is computed, and at
        the speed that the worker shows now."""
        predicted, worker_id = placement.predicted, placement.decode
        if predicted is None or worker_id is None:
            return predicted
        now_s = asyncio.get_running_loop().time()
        role = placement.terms_of(worker_id).role
        speed = self._perf.decode_speed(role, worker_id)
        ending = self._forecast.ending(worker_id, now_s, now_s + predicted.ttft_s)
        relief_s = speed.sequence_s * ending.num_sequences + speed.kv_token_s * ending.kv_tokens
        itl_s = max(speed.fixed_s, predicted.itl_s - relief_s)
        measured = self._decoding_now(worker_id)
        if measured is not None and measured.num_sequences:
            modelled_s = self._perf.itl_s(
                role, measured.num_sequences, measured.kv_tokens, worker_id
            )
            itl_s *= min(MAX_CORRECTION, max(1 / MAX_CORRECTION, measured.gap_s / modelled_s))
        return predicted._replace(itl_s=itl_s)

    def _foretell(self, ticket: Ticket, entrant: _Entrant, placement: Placement) -> None:
        predicted, worker_id = placement.predicted, placement.decode
        if predicted is None or worker_id is None:
            return
        output_s = ticket.num_output_tokens * predicted.itl_s
        now_s = asyncio.get_running_loop().time()
        running = self._forecast.add(
            worker_id,
            ends_at_s=now_s + predicted.ttft_s + output_s,
            kv_tokens=ticket.num_prompt_tokens + ticket.num_output_tokens,
        )
        entrant.decoding = (worker_id, running)

    # A request's beginning and end.

    def _ticket(self, flight: Flight, now_s: float) -> Ticket:
        request = flight.request
        name = request.slo_class
        if name not in self._slo.classes:
            name = self._slo.default_class
        targets = request.targets or class_targets(self._slo, name)
        age_s = max(0.0, self._wall_clock() - request.arrived_at_s) if request.arrived_at_s else 0.0
        arrived_at_s = now_s - age_s
        due_at_s = flight.deadline_at_s
        if targets.ttft_s is not None:
            due_at_s = min(due_at_s, arrived_at_s + targets.ttft_s)
        return Ticket(
            tenant=request.tenant,
            cost_tokens=1.0,
            priority=request.priority,
            due_at_s=due_at_s,
            weight=request.weight,
            slo_class=name,
            targets=targets,
            arrived_at_s=arrived_at_s,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=request.sampling.max_tokens,
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
        num_uncached = ticket.num_uncached_tokens if record.placements else 0
        if record.num_cached_tokens is not None:
            num_uncached = ticket.num_prompt_tokens - record.num_cached_tokens
        work_tokens = lane.end(
            ticket,
            num_uncached_tokens=num_uncached,
            num_output_tokens=record.num_output_tokens,
        )
        ttft_s = record.timeline.seconds(LifecycleEvent.ARRIVED, LifecycleEvent.FIRST_TOKEN)
        mean_itl_s = _mean_itl_s(record)
        is_whole = record.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        lane.learn(
            ticket,
            ttft_s=None if record.failures else ttft_s,
            mean_itl_s=None if record.failures or record.migrations else mean_itl_s,
            num_output_tokens=record.num_output_tokens if is_whole else None,
        )
        outcome = SloResult(None, None)
        if is_whole or ttft_s is not None or record.finish_reason is FinishReason.ERROR:
            # Else the client did not wait for what was promised.
            outcome = result(ticket.targets, ttft_s=ttft_s, mean_itl_s=mean_itl_s)
        self._recorder.ended(
            ticket, outcome, ttft_s=ttft_s, mean_itl_s=mean_itl_s, work_tokens=work_tokens
        )


def _mean_itl_s(record: RequestRecord) -> float | None:
    first_at_s = record.timeline.points.get(LifecycleEvent.FIRST_TOKEN)
    if first_at_s is None or record.num_output_tokens < 2:
        return None
    return max(0.0, record.last_token_at_s - first_at_s) / (record.num_output_tokens - 1)
