"""Runs requests on workers: the `Generator` behind the HTTP and gRPC edges.

 1. take the tenant's quota, wait for its turn (`admission_gate`), which also places and submits it
 2. follow their deltas through one mailbox, join them by output position
 3. text stage: detokenize, cut at stop strings
 4. a worker that fails, stalls or vanishes ends the attempt, not the request: place anew with the
    tokens produced so far; text, positions and random numbers go on where they were
 5. at the end, whichever way: cancel what is left on the workers, write histograms and log line

Nothing waits without bound: the request's deadline is a timer, a watchdog looks for attempts
nobody works on, and retries have a budget.

While a request runs `migrate` may move it to another worker; here the old one's tokens and the new
one's are joined like any others.

Does not know: HTTP, prompts as text, how workers are found.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

from baton.core.errors import (
    BatonError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    ModelNotFound,
    NoWorker,
    Overloaded,
    RequestCancelled,
    RequestError,
    Unavailable,
    WorkerLost,
)
from baton.core.lifecycle import LifecycleEvent
from baton.core.request import FinishReason, TokenDelta
from baton.core.worker_info import WorkerId
from baton.engine.tokenizer import Tokenizer
from services.router.admission.admission_gate import AdmissionGate
from services.router.config import DispatchConfig, HealthConfig
from services.router.health import Observations, assess
from services.router.migration.handover import Handover
from services.router.requests.attempt import Attempt, AttemptFailure, WorkOrder
from services.router.requests.detokenize import TextStage
from services.router.requests.failure_book import FailureBook
from services.router.requests.flight import Flight
from services.router.requests.generation import (
    GenerationDelta,
    GenerationInput,
    Health,
    ModelCard,
)
from services.router.requests.mailbox import Arrival
from services.router.requests.request_log import RequestRecord, RequestRecorder
from services.router.requests.starter import Starter
from services.router.requests.token_stream import NewTokens
from services.router.requests.watchdog import Watchdog
from services.router.tenants.quota import QuotaDesk
from services.router.workers.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

_BROKEN_OFF = (FinishReason.ERROR, FinishReason.CANCELLED)
RETRY_PAUSE_S = 0.1
"""Before trying a worker that failed this request again; doubles with every failure."""


class Dispatcher:
    """Implements `generation.Generator`. Everything runs on one event loop."""

    def __init__(
        self,
        *,
        pool: WorkerPool,
        starter: Starter,
        gate: AdmissionGate,
        quotas: QuotaDesk,
        tokenizers: Mapping[str, Tokenizer],
        recorder: RequestRecorder,
        failures: FailureBook,
        config: DispatchConfig,
        health: HealthConfig,
        rng: random.Random,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`tokenizers`: by model name. `rng` draws the seeds that clients left out."""
        self._pool = pool
        self._tokenizers = tokenizers
        self._recorder = recorder
        self._failures = failures
        self._config = config
        self._starter = starter
        self._gate = gate
        self._quotas = quotas
        self._health = health
        self._rng = rng
        self._wall_clock = wall_clock
        self._flights: set[Flight] = set()
        self._first_seen_s: dict[str, int] = {}
        self._last_token_at_s: float | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start(self) -> None:
        watchdog = Watchdog(
            self._flights, self._config, give_up=self._drop_slow, wall_clock=self._wall_clock
        )
        self._watching = asyncio.create_task(watchdog.run(), name="request watchdog")

    async def stop(self) -> None:
        """Requests still running end with Unavailable."""
        self._is_stopping = True
        for flight in self._flights:
            self._abort(flight, Unavailable("the router is stopping; send the request again"))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    @property
    def flights(self) -> Collection[Flight]:
        """The requests in flight now; not a copy."""
        return self._flights

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    def models(self) -> list[ModelCard]:
        lengths: dict[str, int] = {}
        for session in self._pool.sessions():
            info = session.info
            if info is None or not session.is_ready or info.model_name not in self._tokenizers:
                continue
            shortest = lengths.get(info.model_name, info.max_model_len)
            lengths[info.model_name] = min(shortest, info.max_model_len)
        now_s = int(self._wall_clock())
        return [
            ModelCard(
                name, length, self._tokenizers[name], self._first_seen_s.setdefault(name, now_s)
            )
            for name, length in sorted(lengths.items())
        ]

    async def health(self) -> Health:
        now_s = asyncio.get_running_loop().time()
        progress = [s.last_progress_at_s for s in self._pool.sessions() if s.is_ready]
        attempts = [f.attempt for f in self._flights if f.attempt is not None]
        waits = [now_s - a.mailbox.last_put_at_s for a in attempts if a.waits_for is not None]
        token_at_s = self._last_token_at_s
        return assess(
            Observations(
                workers=self._pool.view().workers,
                num_in_flight=len(self._flights),
                oldest_wait_s=max(waits, default=0.0),
                token_age_s=None if token_at_s is None else now_s - token_at_s,
                progress_age_s=now_s - max(progress) if progress else None,
                shared=self._quotas.shared_status(),
            ),
            self._health,
        )

    async def generate(self, request: GenerationInput) -> AsyncIterator[Sequence[GenerationDelta]]:
        flight = self._open(request)
        record = flight.record
        try:
            await self._enter(flight)
            while record.finish_reason is None:
                if flight.attempt is None:
                    if not flight.num_tokens_left:
                        # Only the news of the end was lost.
                        end = NewTokens(finish_reason=FinishReason.LENGTH)
                        yield (flight.emit(end, record.last_token_at_s, self._recorder),)
                        continue
                    flight.attempt = await self._place(flight)
                deltas, error = self._follow(flight, await flight.attempt.mailbox.take())
                if deltas:
                    yield deltas
                if error is not None:
                    raise error
        except (asyncio.CancelledError, GeneratorExit):
            record.finish_reason = record.finish_reason or FinishReason.CANCELLED
            raise
        except BaseException as error:
            record.finish_reason, record.error = FinishReason.ERROR, error
            raise
        finally:
            self._close(flight)

    # Beginning and end of a request.

    def _open(self, request: GenerationInput) -> Flight:
        """Raises RequestError or Unavailable before any work."""
        if self._is_stopping:
            raise Unavailable("the router is stopping; send the request again")
        tokenizer = self._tokenizers.get(request.model)
        if tokenizer is None:
            raise ModelNotFound(
                f"model {request.model!r} does not exist; "
                f"served here: {', '.join(sorted(self._tokenizers))}",
                param="model",
            )
        self._check_length(request)
        loop = asyncio.get_running_loop()
        arrived_at_s = request.arrived_at_s or self._wall_clock()
        remaining_s = request.deadline_s - max(0.0, self._wall_clock() - arrived_at_s)
        sampling = request.sampling
        if sampling.seed is None and not sampling.is_greedy:
            # A replay must draw what the lost worker drew.
            sampling = dataclasses.replace(sampling, seed=self._rng.getrandbits(63))
        flight = Flight(
            request,
            WorkOrder(request.prompt_token_ids, sampling, tokenizer.eos_token_ids),
            TextStage(
                tokenizer.detokenizer(request.prompt_token_ids),
                request.stop,
                min_tokens=sampling.min_tokens,
            ),
            RequestRecord(request.request_id, request.model, len(request.prompt_token_ids)),
            deadline_at_s=loop.time() + remaining_s,
        )
        flight.record.timeline.record(LifecycleEvent.ARRIVED, arrived_at_s)
        flight.timer = loop.call_at(flight.deadline_at_s, self._expire, flight)
        self._flights.add(flight)
        self._recorder.started()
        return flight

    def _check_length(self, request: GenerationInput) -> None:
        limits = [
            s.info.max_model_len
            for s in self._pool.sessions()
            if s.info is not None and s.info.model_name == request.model
        ]
        num_tokens = len(request.prompt_token_ids)
        if limits and num_tokens >= max(limits):
            raise ContextLengthExceeded(
                f"the prompt has {num_tokens} tokens, but the context of {max(limits)} tokens "
                "must hold it and at least one token of output; shorten the prompt",
                param="prompt",
            )

    async def _enter(self, flight: Flight) -> None:
        """Returns when it is the request's turn. Raises Overloaded, NoWorker, Unavailable,
        DeadlineExceeded."""
        try:
            flight.grant = await self._quotas.take(flight.request)
            if flight.abort is not None:
                raise flight.abort
            await self._gate.enter(flight)
        except RequestError:
            flight.record.is_turned_away = True
            raise

    def _close(self, flight: Flight) -> None:
        if flight.timer is not None:
            flight.timer.cancel()
        record, finish = flight.record, flight.record.finish_reason
        self._end_attempt(flight, "cancelled" if finish is None else finish.value)
        self._flights.discard(flight)
        self._gate.leave(flight)
        num_prompt = record.num_prompt_tokens if record.placements else 0
        self._quotas.settle(flight.grant, num_prompt + record.num_output_tokens)
        self._recorder.ended(record)

    def _end_attempt(self, flight: Flight, reason: str) -> None:
        if flight.attempt is not None:
            flight.attempt.close(reason, asyncio.get_running_loop().time())
            flight.attempt = None

    # Placement.

    async def _place(self, flight: Flight) -> Attempt:
        """Start the next attempt, waiting a bounded time for a worker.

        Raises NoWorker, DeadlineExceeded, Unavailable.
        """
        loop = asyncio.get_running_loop()
        patience_until_s = loop.time() + self._config.worker_wait_s
        num_failures = len(flight.record.failures)
        pause_s = RETRY_PAUSE_S * 2 ** (num_failures - 1) if num_failures else 0.0
        while True:
            if flight.abort is not None:
                raise flight.abort
            try:
                placement = self._starter.choose(flight)
                if pause_s and flight.avoid.intersection(placement.workers):
                    await asyncio.sleep(min(pause_s, flight.deadline_at_s - loop.time()))
                    pause_s = 0.0
                    continue
                return self._starter.start(flight, placement)
            except (NoWorker, WorkerLost):
                now_s = loop.time()
                if now_s >= flight.deadline_at_s:
                    self._expire(flight)
                    continue
                if now_s >= patience_until_s:
                    raise
            left_s = min(patience_until_s, flight.deadline_at_s) - now_s
            await self._pool.wait_for_change(min(left_s, self._config.watchdog_period_s))

    # Following a request.

    def _follow(
        self, flight: Flight, arrivals: Sequence[Arrival]
    ) -> tuple[list[GenerationDelta], Exception | None]:
        """What the client gets of these arrivals, and why there is no more, if so."""
        deltas: list[GenerationDelta] = []
        try:
            for arrival in arrivals:
                delta = self._advance(flight, arrival)
                if delta is not None:
                    deltas.append(delta)
                if flight.attempt is None:
                    break
        except Exception as error:
            return deltas, error
        return deltas, None

    def _advance(self, flight: Flight, arrival: Arrival) -> GenerationDelta | None:
        """Take one arrival; what the client gets of it. Raises when the request has failed."""
        attempt = flight.attempt
        assert attempt is not None
        delta = arrival.delta
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
        self._last_token_at_s = asyncio.get_running_loop().time()
        if attempt.handover is not None:
            self._note_pause(flight.record, attempt.handover, arrival)
        emitted = flight.emit(new, arrival.at_s, self._recorder)
        if emitted.finish_reason is not None:
            self._failures.succeeded(attempt.placement, self._last_token_at_s)
            self._end_attempt(flight, "finished")
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
        record.failures.append(f"{failure.blamed}: {failure.reason}")
        logger.warning(
            "request %s given up by %s: %s",
            record.request_id, failure.blamed, failure.reason,
        )  # fmt: skip
        self._end_attempt(flight, "placed anew")
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
        is_last_try = len(record.failures) > self._config.max_retries
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

    # Time.

    def _expire(self, flight: Flight) -> None:
        self._abort(
            flight,
            DeadlineExceeded(
                f"the request did not finish within its deadline of {flight.request.deadline_s:g} s"
            ),
        )

    def _drop_slow(self, flight: Flight, waited_s: float) -> None:
        """Free the workers now: whoever should read the error does not read."""
        flight.abort = flight.abort or RequestCancelled(
            f"the client took no output for {waited_s:.0f} s while the request went on; "
            "read faster, or raise dispatch.slow_client_s"
        )
        self._recorder.slow_client()
        logger.warning("request %s: %s", flight.record.request_id, flight.abort)
        self._end_attempt(flight, "the client does not read")

    def _abort(self, flight: Flight, error: BatonError) -> None:
        flight.abort = flight.abort or error
        self._gate.abort(flight, flight.abort)
        if flight.attempt is not None:
            now_s = asyncio.get_running_loop().time()
            flight.attempt.mailbox.put(Arrival(None, self._wall_clock(), lost=str(error)), now_s)
