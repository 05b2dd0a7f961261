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
    DeadlineExceeded,
    NoWorker,
    RequestCancelled,
    RequestError,
    Unavailable,
    WorkerLost,
)
from baton.core.lifecycle import LifecycleEvent
from baton.core.request import FinishReason
from baton.engine.tokenizer import Tokenizer
from services.router.admission.admission_gate import AdmissionGate
from services.router.config import DispatchConfig, HealthConfig
from services.router.health import Observations, assess
from services.router.requests.attempt import Attempt, WorkOrder
from services.router.requests.catalogue import Catalogue
from services.router.requests.detokenize import TextStage
from services.router.requests.failure_book import FailureBook
from services.router.requests.flight import Flight
from services.router.requests.follower import Follower
from services.router.requests.generation import (
    GenerationDelta,
    GenerationInput,
    Health,
    ModelCard,
)
from services.router.requests.mailbox import Arrival
from services.router.requests.request_log import RequestRecorder
from services.router.requests.request_record import RequestRecord
from services.router.requests.starter import Starter
from services.router.requests.token_stream import NewTokens
from services.router.requests.watchdog import Watchdog
from services.router.shared.state import QuotaLimits
from services.router.tenants.quota import QuotaDesk
from services.router.tenants.quota_hold import QuotaHold
from services.router.workers.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

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
        self._catalogue = Catalogue(pool, tokenizers, wall_clock)
        self._follower = Follower(
            pool, recorder=recorder, failures=failures, max_retries=config.max_retries
        )
        self._recorder = recorder
        self._config = config
        self._starter = starter
        self._gate = gate
        self._quotas = quotas
        self._health = health
        self._rng = rng
        self._wall_clock = wall_clock
        self._flights: set[Flight] = set()
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

    async def hold_quota(self, tenant: str, limits: QuotaLimits) -> QuotaHold | None:
        return await self._quotas.hold(tenant, limits)

    def models(self) -> list[ModelCard]:
        return self._catalogue.models()

    async def health(self) -> Health:
        now_s = asyncio.get_running_loop().time()
        progress = [s.last_progress_at_s for s in self._pool.sessions() if s.is_ready]
        attempts = [f.attempt for f in self._flights if f.attempt is not None]
        waits = [now_s - a.mailbox.last_put_at_s for a in attempts if a.waits_for is not None]
        token_at_s = self._follower.last_token_at_s
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
                deltas, error = self._follower.follow(flight, await flight.attempt.mailbox.take())
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
        tokenizer = self._catalogue.tokenizer_for(request)
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
                tokenizer.detokenizer(
                    request.prompt_token_ids, skip_special_tokens=request.skip_special_tokens
                ),
                request.stop,
                min_tokens=sampling.min_tokens,
                includes_stop=request.includes_stop,
            ),
            RequestRecord(
                request.request_id,
                request.model,
                len(request.prompt_token_ids),
                tenant=request.tenant,
                trace=request.trace,
            ),
            deadline_at_s=loop.time() + remaining_s,
        )
        flight.record.timeline.record(LifecycleEvent.ARRIVED, arrived_at_s)
        flight.timer = loop.call_at(flight.deadline_at_s, self._expire, flight)
        self._flights.add(flight)
        self._recorder.started(flight.record)
        return flight

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
        self._follower.end_attempt(flight, "cancelled" if finish is None else finish.value)
        self._flights.discard(flight)
        self._gate.leave(flight)
        num_prompt = record.num_prompt_tokens if record.placements else 0
        self._quotas.settle(flight.grant, num_prompt + record.num_output_tokens)
        self._recorder.ended(record, flight.ticket)
        # Their tracebacks lead back here, and would keep a prompt until the next collection.
        record.error = flight.abort = None

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
        self._follower.end_attempt(flight, "the client does not read")

    def _abort(self, flight: Flight, error: BatonError) -> None:
        flight.abort = flight.abort or error
        self._gate.abort(flight, flight.abort)
        if flight.attempt is not None:
            now_s = asyncio.get_running_loop().time()
            flight.attempt.mailbox.put(Arrival(None, self._wall_clock(), lost=str(error)), now_s)
