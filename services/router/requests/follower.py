"""Follows the requests in flight: what workers send becomes what clients get.

    arrivals ─► observe the attempt ─► join by output position ─► text ─► delta
                        └─ failed ─► the attempt ends; the request may be placed anew, or is over

Never waits, and places nothing.

Does not know: HTTP, admission, where a request goes next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from baton.core.errors import InternalError, Overloaded, WorkerLost
from baton.core.lifecycle import Timeline
from baton.core.request import FinishReason, TokenDelta
from baton.core.worker_info import WorkerId
from services.router.migration.handover import Handover
from services.router.requests.attempt import Attempt, AttemptFailure
from services.router.requests.failure_book import FailureBook
from services.router.requests.flight import Flight
from services.router.requests.generation import GenerationDelta
from services.router.requests.mailbox import Arrival
from services.router.requests.request_log import RequestRecorder
from services.router.requests.request_record import RequestRecord, WorkerPart
from services.router.workers.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

_BROKEN_OFF = (FinishReason.ERROR, FinishReason.CANCELLED)
FINISHED = "finished"
MAX_HANDED_BACK = 32
"""By workers that leave their pools, before it counts as a failure: so many do not leave while one
request runs."""


class Follower:
    """One per router. Everything runs on one event loop."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        recorder: RequestRecorder,
        failures: FailureBook,
        max_retries: int,
    ) -> None:
        self._pool = pool
        self._recorder = recorder
        self._failures = failures
        self._max_retries = max_retries
        self.last_token_at_s: float | None = None
        """Event-loop time of the last token of any request."""

    def end_attempt(self, flight: Flight, reason: str) -> None:
        """Take back what workers still do for it, if anything."""
        if flight.attempt is not None:
            if flight.attempt.unfinished or reason != FINISHED:
                self._recorder.left(flight.record, flight.attempt.wire_id)
            flight.attempt.close(reason, asyncio.get_running_loop().time())
            flight.attempt = None

    def follow(
        self, flight: Flight, arrivals: Sequence[Arrival]
    ) -> tuple[list[GenerationDelta], Exception | None]:
        """What the client gets of these arrivals, and why there is no more, if so."""
        deltas: list[GenerationDelta] = []
        is_plain_text = flight.text.is_plain
        try:
            for arrival in arrivals:
                attempt, new = flight.attempt, arrival.delta
                if attempt is None:
                    break
                if (
                    is_plain_text
                    and new is not None
                    and attempt.is_plain(arrival.worker_id, new)
                    and flight.stream.extend(new)
                ):
                    deltas.append(flight.go_on(new, arrival.at_s, self._recorder))
                    continue
                delta = self._advance(flight, arrival)
                if delta is not None:
                    deltas.append(delta)
        except Exception as error:
            return deltas, error
        finally:
            if deltas:
                self.last_token_at_s = asyncio.get_running_loop().time()
        return deltas, None

    def _advance(self, flight: Flight, arrival: Arrival) -> GenerationDelta | None:
        """Take one arrival; what the client gets of it. Raises when the request has failed."""
        attempt = flight.attempt
        assert attempt is not None
        delta = arrival.delta
        if delta is not None and delta.timeline is not None:
            _note_part(flight.record, attempt, arrival, delta.timeline)
        failure = attempt.observe(arrival)
        if failure is not None:
            self._on_failure(flight, failure)
            return None
        if delta is None or delta.finish_reason in _BROKEN_OFF:
            # A worker that no longer has the request; its earlier tokens may be missed now.
            self._check_order(flight, attempt)
            return None
        if delta.timeline is not None or delta.num_cached_tokens:
            self._note(flight, attempt, arrival.worker_id, delta)
        new = flight.stream.push(delta)
        if new.finish_reason is None:
            if flight.stream.is_waiting or not attempt.unfinished:
                self._check_order(flight, attempt)
            if not new.token_ids:
                return None
        if attempt.handover is not None:
            self._note_pause(flight.record, attempt.handover, arrival)
        emitted = flight.emit(new, arrival.at_s, self._recorder)
        if emitted.finish_reason is not None:
            self._failures.succeeded(attempt.placement, asyncio.get_running_loop().time())
            self.end_attempt(flight, FINISHED)
        return emitted

    def _note(
        self, flight: Flight, attempt: Attempt, worker_id: WorkerId | None, delta: TokenDelta
    ) -> None:
        """What a worker measured, from its first or last delta."""
        if delta.timeline is not None:
            flight.record.merge(worker_id, delta)
        is_placed = worker_id in attempt.placement.workers
        if worker_id is None or worker_id in attempt.cached_seen or not is_placed:
            return
        attempt.cached_seen.add(worker_id)
        self._recorder.cached(
            flight.record,
            attempt.role_of(worker_id),
            delta.num_cached_tokens,
            computes_prompt=attempt.computes_prompt(worker_id),
        )

    def _note_pause(self, record: RequestRecord, handover: Handover, arrival: Arrival) -> None:
        """What the client waited for because its request has moved."""
        is_first = handover.pause_s is None and handover.has_moved
        if is_first and arrival.worker_id == handover.target:
            handover.pause_s = max(0.0, arrival.at_s - record.last_token_at_s)
            self._recorder.paused(record, handover.pause_s)

    def _check_order(self, flight: Flight, attempt: Attempt) -> None:
        failure = attempt.check_order(is_waiting=flight.stream.is_waiting)
        if failure is not None:
            self._on_failure(flight, failure)

    def _on_failure(self, flight: Flight, failure: AttemptFailure) -> None:
        """End the attempt; returns when the request may be placed again, else raises."""
        if flight.abort is not None:
            raise flight.abort
        record = flight.record
        if failure.is_handed_back and flight.num_handed_back < MAX_HANDED_BACK:
            # The worker takes no work by now, as this router has heard before: the next placement
            # goes elsewhere.
            flight.num_handed_back += 1
            logger.info("request %s is placed anew: %s", record.request_id, failure.reason)
            self.end_attempt(flight, "placed anew")
            return
        record.failures.append(f"{failure.blamed}: {failure.reason}")
        logger.warning(
            "request %s given up by %s: %s",
            record.request_id, failure.blamed, failure.reason,
        )  # fmt: skip
        self.end_attempt(flight, "placed anew")
        may_retry = self._failures.failed(failure, asyncio.get_running_loop().time())
        if not failure.is_retryable:
            raise InternalError(
                "a worker could not process the request; "
                "the router's log holds the details under its request id"
            )
        if failure.blamed is not None:
            flight.avoid.add(failure.blamed)
            if failure.is_overload:
                flight.full.add(failure.blamed)
        is_last_try = len(record.failures) > self._max_retries
        if failure.is_overload and (is_last_try or self._is_hopeless(flight)):
            raise Overloaded("all workers are full; try again in a moment")
        if not may_retry:
            raise WorkerLost(
                "the request failed on a worker, and too many others did for another try; "
                "try again in a moment"
            )
        if is_last_try:
            raise WorkerLost(
                f"the request failed on {len(record.failures)} placements; try again in a moment"
            )

    def _is_hopeless(self, flight: Flight) -> bool:
        """Every worker has refused for being full. A request that has tokens is worth waiting."""
        eligible = self._pool.view().eligible(model=flight.request.model)
        return not flight.stream.next_index and flight.full.issuperset(
            w.info.worker_id for w in eligible
        )


def _note_part(
    record: RequestRecord, attempt: Attempt, arrival: Arrival, timeline: Timeline
) -> None:
    """What a worker measured counts even if the request has failed there."""
    worker_id = arrival.worker_id
    if worker_id is None or worker_id not in attempt.sessions:
        return
    record.parts.append(
        WorkerPart(
            worker_id,
            attempt.role_of(worker_id),
            worker_id in attempt.placement.workers and attempt.computes_prompt(worker_id),
            timeline,
            arrival.at_s,
        )
    )
