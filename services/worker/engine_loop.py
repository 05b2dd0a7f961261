"""The engine's own thread, and its borders with the event loop.

event loop ── commands (thread-safe queue) ──► engine thread: run commands, step, repeat
           ◄── one StepResult per step (call_soon_threadsafe, in order) ──

The thread sleeps on a condition while there is neither a command nor anything to compute. It
numbers the KV events, because only here do the pool's changes and their numbers happen together.
An engine that raises, or whose batch fails, loses the requests it was running, not the worker;
one that keeps failing is broken and takes nothing more.

Not known here: sessions, routers, transfers, gRPC.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from baton.core.block import BlockHash, BlockId
from baton.core.clock import Clock
from baton.core.errors import (
    BatonError,
    InternalError,
    InvalidRequest,
    RequestError,
    Unavailable,
)
from baton.core.request import GenerateRequest, RequestId, SamplingParams, TokenDelta, Work
from baton.core.worker_info import LoadReport
from baton.engine.engine import BatchOutcome, Reservation, StepOutput
from baton.engine.layer_notices import LayerSink
from baton.engine.scheduler import SchedulerLimits
from services.worker.core_share import AllCores, CoreShare
from services.worker.engine_answers import Answers, Command
from services.worker.engine_api import EngineApi, Snapshot, StepResult
from services.worker.kv_events import KvEventLog, TierContents
from services.worker.last_delta import error_delta, is_last, refusal, turn_into_failure

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0
"""A step in progress cannot be interrupted; beyond this the thread is left to die alone."""
MAX_FAILED_STEPS = 3
"""This many failures with no computed batch between them, and the engine is called broken."""
WARM_UP_TOKENS = 4
FAILURE = "the worker's engine failed"
STOPPED = "the worker's engine has stopped"

T = TypeVar("T")


class EngineLoop:
    """Drives one engine on one thread. All methods are called on the event loop's thread."""

    def __init__(
        self,
        engine: EngineApi,
        *,
        on_step: Callable[[StepResult], None],
        clock: Clock,
        cores: AllCores | CoreShare | None = None,
    ) -> None:
        """`on_step` runs on the event loop, once per step, in order."""
        self._engine = engine
        self._cores = cores or AllCores()
        self._on_step = on_step
        self._clock = clock
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._is_stopping = False
        self._is_computing = False
        self._beat_at_s = clock.now()
        self._num_failed_steps = 0
        self._kv_log = KvEventLog(engine.is_cached)
        self._last_load = LoadReport()
        self._submitted: set[RequestId] = set()
        """Requests the engine will still end with a delta."""
        self._failing: set[RequestId] = set()
        """Those of them whose end is our failure, whatever the engine calls it."""
        self._undelivered: list[TokenDelta] = []
        self._answers = Answers(self._send, self._post)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def tell_layers(self, sink: LayerSink) -> None:
        """Before `start`: `sink` runs on the event loop, while a step runs; see the engine's."""
        self._engine.tell_layers(lambda layers: self._post(sink, layers))

    def attach_tiers(self, tiers: TierContents) -> None:
        """Before `start`: what these hold is told with the KV events."""
        self._kv_log.attach(tiers)

    def start(self) -> None:
        """Start the thread; results arrive on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._beat_at_s = self._clock.now()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the step in progress and join it. Pending commands are dropped."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                logger.error("the engine thread did not end within %.0f s", JOIN_TIMEOUT_S)
        self._answers.refuse(Unavailable(STOPPED))

    def submit(self, request: GenerateRequest) -> None:
        """A refusal comes back as a delta with FinishReason.ERROR."""
        self._send(lambda: self._submit(request))

    def cancel(self, request_id: RequestId) -> None:
        self._send(lambda: self._engine.cancel(request_id))

    def activate(self, request_id: RequestId, first: TokenDelta) -> None:
        """Where `first` cannot belong to the request, it ends with a retryable error."""
        self._send(lambda: self._activate(request_id, first))

    def abandon(self, request_id: RequestId, *, unsettled: Sequence[BlockId]) -> None:
        def run() -> None:
            self._submitted.discard(request_id)
            self._engine.abandon(request_id, unsettled=unsettled)

        self._send(run)

    def recover(self, block_ids: Sequence[BlockId]) -> None:
        self._send(lambda: self._engine.recover(block_ids))

    def release_lease(self, request_id: RequestId) -> None:
        self._send(lambda: self._engine.release_lease(request_id))

    async def lease_prefix(
        self, lease_id: RequestId, hashes: Sequence[BlockHash]
    ) -> tuple[BlockId, ...]:
        """As the engine's. Cancelled while it waits, it leaves no lease behind."""
        return await self._ask(
            lambda: self._engine.lease_prefix(lease_id, hashes),
            undo=lambda leased: self.release_lease(lease_id) if leased else None,
        )

    async def reserve_import(
        self, import_id: RequestId, hashes: Sequence[BlockHash]
    ) -> Reservation | None:
        """As the engine's. Cancelled while it waits, it leaves no import behind."""
        return await self._ask(
            lambda: self._engine.reserve_import(import_id, hashes),
            undo=lambda made: self.abandon_import(import_id, unsettled=()) if made else None,
        )

    def finish_import(self, import_id: RequestId, *, num_blocks: int) -> None:
        self._send(lambda: self._engine.finish_import(import_id, num_blocks=num_blocks))

    def abandon_import(self, import_id: RequestId, *, unsettled: Sequence[BlockId]) -> None:
        self._send(lambda: self._engine.abandon_import(import_id, unsettled=unsettled))

    async def start_handover(self, request_id: RequestId, *, num_known_tokens: int) -> None:
        """As the engine's. Cancelled while it waits, it leaves neither handover nor lease."""

        def undo(_: None) -> None:
            self.release_lease(request_id)
            self.resume(request_id)

        await self._ask(
            lambda: self._engine.start_handover(request_id, num_known_tokens=num_known_tokens),
            undo=undo,
        )

    def freeze(self, request_id: RequestId) -> None:
        self._send(lambda: self._engine.freeze(request_id))

    def resume(self, request_id: RequestId) -> None:
        """After `release_lease`."""
        self._send(lambda: self._engine.resume(request_id))

    def finish_handover(self, request_id: RequestId) -> None:
        """The next step result holds the request's last delta, unless it has ended already."""

        def run() -> None:
            self._engine.finish_handover(request_id)
            # Its end is on its way, and whatever fails from here on is no failure of it.
            self._submitted.discard(request_id)

        self._send(run)

    async def take_unsaved(self, max_blocks: int) -> list[tuple[BlockHash, BlockId]]:
        """As the engine's. Cancelled while it waits, it leaves nothing leased."""
        return await self._ask(
            lambda: self._engine.take_unsaved(max_blocks),
            undo=lambda taken: self.release_saved([b for _, b in taken], is_saved=False),
        )

    def release_saved(self, block_ids: Sequence[BlockId], *, is_saved: bool) -> None:
        self._send(lambda: self._engine.release_saved(block_ids, is_saved=is_saved))

    def tell_tiers(self) -> None:
        """Make an event of what changed in the tiers, also while there is nothing to compute."""
        self._send(lambda: None)

    async def snapshot(self) -> Snapshot:
        """The engine's state after all commands sent so far."""
        return await self._ask(self._take_snapshot)

    async def warm_up(self) -> None:
        """Compute a few tokens for nobody, so that the first client does not pay for it.

        Raises InternalError when they do not come.
        """
        await self._ask(self._compute_sample)

    async def check_integrity(self) -> None:
        """Raises what the engine's own check raises."""
        await self._ask(self._engine.check_integrity)

    async def is_empty(self) -> bool:
        """No sequence, reservation or lease after all commands sent so far."""
        return await self._ask(lambda: self._engine.is_empty)

    def set_limits(self, limits: SchedulerLimits) -> None:
        """As the engine's, for whatever is submitted from now on."""
        self._send(lambda: self._engine.set_limits(limits))

    async def waiting_ids(self) -> tuple[RequestId, ...]:
        """As the engine's."""
        return await self._ask(self._engine.waiting_ids)

    async def ping(self) -> None:
        """Returns when the engine's thread has come round."""
        await self._ask(lambda: None)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_computing(self) -> bool:
        """True from the moment there is work until the thread sleeps again."""
        return self._is_computing

    @property
    def is_broken(self) -> bool:
        return self._num_failed_steps >= MAX_FAILED_STEPS

    @property
    def seconds_since_beat(self) -> float:
        """Age of the last sign of life of the thread."""
        return self._clock.now() - self._beat_at_s

    def _send(self, command: Command) -> bool:
        """False when the loop is stopping and will run no further command."""
        with self._wake:
            if not self._is_stopping:
                self._commands.append(command)
                self._wake.notify()
            return not self._is_stopping

    async def _ask(
        self, question: Callable[[], T], *, undo: Callable[[T], None] | None = None
    ) -> T:
        """The answer between two steps; see `Answers.ask`.

        Raises Unavailable once the loop is stopping.
        """
        return await self._answers.ask(question, otherwise=Unavailable(STOPPED), undo=undo)

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        while True:
            commands = self._take_commands()
            if commands is None:
                return
            for command in commands:
                self._execute(command)
            if self._engine.has_work:
                self._cores.adjust()
            self._step()

    def _take_commands(self) -> list[Command] | None:
        """The waiting commands; sleeps while there is nothing to do. None: stop."""
        with self._wake:
            self._beat_at_s = self._clock.now()
            while not (self._commands or self._is_stopping or self._has_work()):
                self._is_computing = False
                self._cores.leave()
                self._wake.wait()
                self._beat_at_s = self._clock.now()
            if self._is_stopping:
                self._is_computing = False
                return None
            self._is_computing = True
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _has_work(self) -> bool:
        if self._undelivered:
            return True
        return self._engine.has_work and not self.is_broken

    def _execute(self, command: Command) -> None:
        try:
            command()
        except Exception as error:
            # A broken law of the pool is an InternalError: no answer to a command, but a defect.
            if isinstance(error, (BatonError, KeyError)) and not isinstance(error, InternalError):
                logger.info("engine command had no effect: %s", error)
                return
            logger.exception("engine command failed")
            self._num_failed_steps += 1
            self._fail_requests()

    def _submit(self, request: GenerateRequest) -> None:
        try:
            if self.is_broken:
                raise Unavailable("the worker's engine is broken; it waits to be restarted")
            self._engine.submit(request)
        except (RequestError, Unavailable) as error:
            self._undelivered.append(refusal(request.request_id, error))
        else:
            self._submitted.add(request.request_id)

    def _activate(self, request_id: RequestId, first: TokenDelta) -> None:
        try:
            self._engine.activate(request_id, first)
        except InvalidRequest as error:
            logger.warning("what arrived for request %s is no use: %s", request_id, error)
            self._engine.abandon(request_id, unsettled=())
            if request_id in self._submitted:
                self._undelivered.append(error_delta(request_id, str(error), is_retryable=True))
            return
        if first.finish_reason is not None:
            # The engine keeps the blocks and says nothing more of the request.
            self._submitted.discard(request_id)

    def _step(self) -> None:
        if self.is_broken:
            self._deliver(StepOutput(), LoadReport(is_unhealthy=True))
            return
        try:
            output = self._engine.step()
            load = self._engine.load()
        except Exception:
            logger.exception("engine step failed; its requests end with an error")
            self._num_failed_steps += 1
            self._fail_requests()
            return
        if output.batch is BatchOutcome.COMPUTED:
            self._num_failed_steps = 0
        elif output.batch is BatchOutcome.FAILED:
            self._num_failed_steps += 1
        self._deliver(output, load)
        if self.is_broken:
            # Those that were not part of the failed batch would wait for ever.
            self._fail_requests()

    def _deliver(self, output: StepOutput, load: LoadReport) -> None:
        if self._undelivered:
            output = dataclasses.replace(output, deltas=[*self._undelivered, *output.deltas])
            self._undelivered = []
        for delta in output.deltas:
            if is_last(delta):
                self._submitted.discard(delta.request_id)
                if delta.request_id in self._failing:
                    self._failing.discard(delta.request_id)
                    turn_into_failure(delta, FAILURE)
        event = self._kv_log.next_event(output.stored, output.removed)
        if load == self._last_load and event is None and not output.says_something:
            return
        self._last_load = load
        self._post(self._on_step, StepResult(output, load, self._kv_log.sequence, event))

    def _fail_requests(self) -> None:
        """After an unexpected error nothing about the batch is trusted: end all of it."""
        for request_id in list(self._submitted):
            try:
                self._engine.cancel(request_id)
                self._failing.add(request_id)
            except Exception:
                logger.exception("request %s cannot be removed from the engine", request_id)
                self._report_failure(request_id)
        if self.is_broken:
            # No further step will tell of those that were cancelled.
            for request_id in list(self._failing):
                self._report_failure(request_id)

    def _report_failure(self, request_id: RequestId) -> None:
        self._submitted.discard(request_id)
        self._failing.discard(request_id)
        self._undelivered.append(error_delta(request_id, FAILURE, is_retryable=True))

    def _compute_sample(self) -> None:
        sampling = SamplingParams(max_tokens=WARM_UP_TOKENS, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(
            RequestId("warm-up"), Work.GENERATE, (0,) * WARM_UP_TOKENS, sampling
        )
        self._engine.submit(request)
        num_tokens = 0
        for _ in range(10 * WARM_UP_TOKENS):
            num_tokens += sum(len(delta.token_ids) for delta in self._engine.step().deltas)
            if not self._engine.has_work:
                break
        if num_tokens != WARM_UP_TOKENS:
            raise InternalError(f"warm-up made {num_tokens} of {WARM_UP_TOKENS} tokens")

    def _take_snapshot(self) -> Snapshot:
        engine, log = self._engine, self._kv_log
        return Snapshot(
            engine.load(), engine.cached_hashes(), log.sequence, engine.is_empty, *log.below()
        )

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            # The event loop is closed: the process is on its way out.
            self._is_stopping = True
