"""One worker's engine: requests in, one `StepOutput` per step out.

    submit ─► waiting ─► running ─► last delta               GENERATE
    submit ─► waiting ─► running ─► first token, ChunkDone ... release_lease      PREFILL
    submit ─► waiting ─► Reservation ... activate ─► running ─► last delta        DECODE
                                     └── abandon [─► recover]

`step` schedules and launches one step and then waits for the one before, whose results it tells: a
runner that computes on a device of its own always has the next step at hand. With a runner that
computes while it launches, it is the launched step itself that is waited for.

       call 1              call 2                        call 3
    launch step 0    launch 1, wait for 0, tell    launch 2, wait for 1, tell ...

A request that ends while a step in flight computes it gets its last delta at once; its blocks are
released when that step is over. Until then the engine is not empty.

Single-threaded: every call comes from the engine's thread, between steps. A request ends with
exactly one delta that has a timeline, with two exceptions where the caller already knows: an
abandoned reservation, and an activated one whose first token was its last.

Not known here: text, other workers, deadlines (the caller cancels), lease expiry.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum

from baton.core.block import BlockHash, BlockId
from baton.core.clock import Clock
from baton.core.errors import InternalError, InvalidRequest, NotFound
from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import LifecycleEvent
from baton.core.request import FinishReason, GenerateRequest, RequestId, TokenDelta, Work
from baton.core.worker_info import LoadReport
from baton.engine.batch import Batch, Runner, SampledToken
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.handoff import ChunkDone, LeaseTable, Reservation
from baton.engine.in_flight import LaunchedSequence, StepsInFlight
from baton.engine.integrity import check_holders, check_sequence
from baton.engine.postprocess import accept_token, check_request, end_delta, error_delta
from baton.engine.prefix_cache import PrefixCacheStats, commit_computed, extend_hashes
from baton.engine.scheduler import Schedule, Scheduler, SchedulerLimits
from baton.engine.sequence import Sequence, SequenceStatus

__all__ = ["BatchOutcome", "ChunkDone", "Engine", "Reservation", "StepOutput"]

logger = logging.getLogger(__name__)


class BatchOutcome(Enum):
    NONE = "none"
    """No step came to its end in this call."""
    COMPUTED = "computed"
    FAILED = "failed"
    """The runner raised or answered wrongly; all that was in flight has ended with an error."""


@dataclass(slots=True)
class StepOutput:
    """Everything one step, and the calls since the step before, have to tell."""

    deltas: list[TokenDelta] = field(default_factory=list)
    chunks: list[ChunkDone] = field(default_factory=list)
    reservations: list[Reservation] = field(default_factory=list)
    stored: list[BlockHash] = field(default_factory=list)
    """Hashes that became matchable, net; disjoint from `removed`."""
    removed: list[BlockHash] = field(default_factory=list)
    batch: BatchOutcome = BatchOutcome.NONE


class Engine:
    def __init__(
        self,
        *,
        config: EngineConfig,
        layout: KvLayout,
        num_blocks: int,
        max_model_len: int,
        runner: Runner,
        clock: Clock,
        vocab_size: int | None = None,
    ) -> None:
        """`clock` gives wall-clock seconds: time points of several hosts are laid side by side."""
        self._block_size = layout.block_size
        self._is_caching = config.enable_prefix_caching
        self._vocab_size = vocab_size
        self._clock = clock
        # A sequence that alone fills the pool must end there, or it would preempt itself for ever.
        self._max_num_tokens = min(max_model_len, num_blocks * layout.block_size)
        self._in_flight = StepsInFlight(runner)
        self._pool = BlockPool(num_blocks)
        self._leases = LeaseTable(self._pool)
        limits = SchedulerLimits(
            config.max_num_seqs, config.max_num_batched_tokens, config.max_num_waiting
        )
        self._scheduler = Scheduler(self._pool, block_size=layout.block_size, limits=limits)
        self._sequences: dict[RequestId, Sequence] = {}
        self._outbox: list[TokenDelta] = []
        """Deltas that arose between steps."""
        self._is_stalled = False
        """The last step could do nothing, and nothing has changed since."""

    @property
    def max_num_tokens(self) -> int:
        """Tokens of prompt and output together that one sequence can have here."""
        return self._max_num_tokens

    @property
    def has_work(self) -> bool:
        """True when `step` has something to compute, to wait for, to reserve or to deliver."""
        if self._outbox or self._in_flight or self._pool.has_events:
            return True
        scheduler = self._scheduler
        return not self._is_stalled and bool(scheduler.running or scheduler.num_waiting)

    @property
    def is_empty(self) -> bool:
        """No sequence, no reservation, no lease, no step in flight."""
        return not self._sequences and not self._leases and not self._in_flight

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        return self._scheduler.prefix_cache_stats

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request.

        Raises InvalidRequest for what can never be computed here, Overloaded when the queue is
        full. Request ids are unique until the last delta and the release of the lease.
        """
        if request.request_id in self._sequences or request.request_id in self._leases:
            raise InvalidRequest(
                f"request {request.request_id} is already on this worker; use a new id"
            )
        check_request(
            request,
            max_num_tokens=self._max_num_tokens,
            block_size=self._block_size,
            vocab_size=self._vocab_size,
        )
        sequence = Sequence(request)
        sequence.max_num_tokens = min(sequence.max_num_tokens, self._max_num_tokens)
        if self._is_caching:
            extend_hashes(sequence, sequence.num_tokens // self._block_size, self._block_size)
        else:
            sequence.block_hashes = []
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence
        self._is_stalled = False
        if request.work is not Work.DECODE:
            sequence.timeline.record(LifecycleEvent.PREFILL_QUEUED, self._clock.now())

    def activate(self, request_id: RequestId, first: TokenDelta) -> None:
        """The KV of all tokens of a DECODE request has arrived and is vouched for.

        `first` is the delta of the prefill worker with the first token, which is not sent again;
        its timeline is taken over. When the request has ended meanwhile (cancelled, or with
        `first`), its blocks go to the prefix cache and nothing more is said.
        Raises NotFound when the request holds no reservation.
        """
        sequence = self._reserved(request_id)
        has_ended = sequence.is_abandoned or first.finish_reason is not None
        if not has_ended and len(first.token_ids) != 1:
            raise InternalError(f"request {request_id}: {len(first.token_ids)} first tokens")
        self._pool.mark_arrived(sequence.block_table[sequence.num_committed_blocks :])
        sequence.num_computed_tokens = sequence.num_tokens
        commit_computed(sequence, self._pool, self._block_size)
        self._is_stalled = False
        if has_ended:
            self._forget(sequence)
            return
        sequence.token_ids += first.token_ids
        if first.timeline is not None:
            sequence.timeline.merge(first.timeline)
        self._scheduler.join(sequence)
        if sequence.num_tokens >= sequence.max_num_tokens:
            self._end(sequence, end_delta(sequence, FinishReason.LENGTH), self._outbox)

    def abandon(self, request_id: RequestId, *, unsettled: SequenceOf[BlockId]) -> None:
        """Give up a reservation. No delta: the caller knows why and tells the router.

        `unsettled` are blocks of it that a read may still write to; they stay out of use until
        `recover`. Raises NotFound when the request holds no reservation.
        """
        sequence = self._reserved(request_id)
        self._pool.quarantine(unsettled)
        gone = set(unsettled)
        sequence.block_table = [b for b in sequence.block_table if b not in gone]
        self._forget(sequence)
        self._is_stalled = False

    def recover(self, block_ids: SequenceOf[BlockId]) -> None:
        """No read can write to these quarantined blocks any more."""
        self._pool.recover(block_ids)
        self._is_stalled = False

    def release_lease(self, request_id: RequestId) -> None:
        """The reader of a PREFILL request is done, gave up, or its lease ran out. Idempotent."""
        self._leases.release(request_id)
        self._is_stalled = False

    def cancel(self, request_id: RequestId) -> None:
        """End a request with CANCELLED in the next step's deltas; unknown ones are ignored.

        A granted reservation keeps its blocks until `abandon` (or `activate`): only the caller
        knows which reads are in flight. Leases stay until `release_lease`.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.is_abandoned:
            return
        delta = end_delta(sequence, FinishReason.CANCELLED)
        if sequence.status is SequenceStatus.RESERVED:
            sequence.is_abandoned = True
            self._seal(sequence, delta, self._outbox)
        else:
            self._end(sequence, delta, self._outbox)
        self._is_stalled = False

    def step(self) -> StepOutput:
        """Schedule, launch, wait, tell. Returns at once when there is nothing to compute."""
        output = StepOutput(deltas=self._outbox)
        self._outbox = []
        if self._in_flight and self._scheduler.must_preempt:
            while self._in_flight:
                self._complete_oldest(output)
        schedule = self._scheduler.schedule()
        self._record_starts(schedule, output)
        batch = schedule.batch
        if batch.scheduled:
            self._launch(batch, output)
        is_due = self._in_flight.is_full or (bool(self._in_flight) and not batch.scheduled)
        if is_due:
            self._complete_oldest(output)
        self._is_stalled = not (
            batch.scheduled or is_due or schedule.reserved or self._scheduler.running
        )
        output.stored, output.removed = self._pool.take_events()
        return output

    def load(self) -> LoadReport:
        scheduler, counts = self._scheduler, self._pool.counts
        return LoadReport(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            queued_prefill_tokens=scheduler.num_queued_prefill_tokens,
            resident_kv_tokens=sum(
                s.num_computed_tokens for s in (*scheduler.running, *scheduler.retiring)
            ),
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            total_blocks=self._pool.num_blocks,
            leases=len(self._leases),
            reservations=len(scheduler.reserved),
            quarantined_blocks=counts.quarantined,
            num_preemptions=scheduler.num_preemptions,
        )

    def cached_hashes(self) -> list[BlockHash]:
        """Every hash that a new request could match now."""
        return self._pool.cached_hashes()

    def check_integrity(self) -> None:
        """Recount blocks, holders and leases; raises InternalError on the first broken law."""
        self._pool.check_integrity()
        scheduler = self._scheduler
        known = [*scheduler.running, *scheduler.reserved.values(), *scheduler.waiting()]
        if Counter(map(id, known)) != Counter(map(id, self._sequences.values())):
            raise InternalError("scheduler and engine disagree on which sequences exist")
        holders = [*known, *scheduler.retiring]
        for sequence in holders:
            check_sequence(sequence, self._block_size)
        check_holders(self._pool.blocks(), holders, self._leases.block_ids())
        self._in_flight.check_integrity(holders)

    def _reserved(self, request_id: RequestId) -> Sequence:
        sequence = self._scheduler.reserved.get(request_id)
        if sequence is None:
            raise NotFound(f"request {request_id} holds no reservation on this worker")
        return sequence

    def _record_starts(self, schedule: Schedule, output: StepOutput) -> None:
        if not schedule.started and not schedule.reserved:
            return
        now_s = self._clock.now()
        for sequence in schedule.started:
            is_decode = sequence.work is Work.DECODE
            event = LifecycleEvent.DECODE_STARTED if is_decode else LifecycleEvent.PREFILL_STARTED
            sequence.timeline.record(event, now_s)
        for sequence in schedule.reserved:
            sequence.timeline.record(LifecycleEvent.DECODE_RESERVED, now_s)
            output.reservations.append(
                Reservation(
                    sequence.request_id,
                    tuple(sequence.block_table),
                    sequence.num_committed_blocks,
                )
            )

    def _launch(self, batch: Batch, output: StepOutput) -> None:
        try:
            self._in_flight.launch(batch)
        except Exception as error:
            self._fail([sequence for sequence, _ in batch.scheduled], error, output)

    def _complete_oldest(self, output: StepOutput) -> None:
        """Wait for the oldest step in flight and tell what came of it."""
        try:
            outcomes = self._in_flight.wait()
        except Exception as error:
            self._fail([], error, output)
            return
        if output.batch is BatchOutcome.NONE:
            output.batch = BatchOutcome.COMPUTED
        self._scheduler.release_retired()
        self._postprocess(outcomes, output)

    def _fail(self, sequences: list[Sequence], error: Exception, output: StepOutput) -> None:
        """End `sequences` and everything in flight: nobody knows what the device has computed."""
        sequences = list(dict.fromkeys((*sequences, *self._in_flight.abort())))
        logger.error("a step of %d sequences failed", len(sequences), exc_info=error)
        output.batch = BatchOutcome.FAILED
        self._scheduler.release_retired()
        for sequence in sequences:
            if sequence.status is SequenceStatus.RUNNING:
                self._end(sequence, error_delta(sequence, error), output.deltas)

    def _postprocess(
        self, outcomes: list[tuple[LaunchedSequence, SampledToken | None]], output: StepOutput
    ) -> None:
        for (sequence, _, samples), sampled in outcomes:
            if sequence.status is not SequenceStatus.RUNNING:
                # It ended after the launch; its row was computed for nothing.
                continue
            commit_computed(sequence, self._pool, self._block_size)
            delta = accept_token(sequence, sampled) if samples and sampled is not None else None
            if delta is not None and not sequence.has_emitted:
                self._record_first_token(sequence)
            if sequence.work is Work.PREFILL:
                chunk = self._leases.announce(sequence, self._block_size, delta)
                if chunk is not None:
                    output.chunks.append(chunk)
                if delta is not None:
                    self._end(sequence, delta, output.deltas)
            elif delta is not None and delta.finish_reason is not None:
                self._end(sequence, delta, output.deltas)
            elif delta is not None:
                if not sequence.has_emitted:
                    sequence.has_emitted = True
                    delta.num_cached_tokens = sequence.num_cached_tokens
                output.deltas.append(delta)

    def _record_first_token(self, sequence: Sequence) -> None:
        if sequence.work is Work.DECODE:
            return
        now_s = self._clock.now()
        sequence.timeline.record(LifecycleEvent.PREFILL_ENDED, now_s)
        if sequence.work is Work.GENERATE:
            sequence.timeline.record(LifecycleEvent.DECODE_STARTED, now_s)

    def _end(self, sequence: Sequence, delta: TokenDelta, deltas: list[TokenDelta]) -> None:
        """Send the last delta of a sequence and forget it."""
        self._seal(sequence, delta, deltas)
        self._forget(sequence)

    def _seal(self, sequence: Sequence, delta: TokenDelta, deltas: list[TokenDelta]) -> None:
        timeline = sequence.timeline
        if LifecycleEvent.DECODE_STARTED in timeline.points:
            timeline.record(LifecycleEvent.DECODE_ENDED, self._clock.now())
        delta.num_cached_tokens = sequence.num_cached_tokens
        delta.timeline = timeline
        deltas.append(delta)

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
