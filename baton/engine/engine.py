"""One worker's engine: requests in, one `StepOutput` per step out.

    submit ─► waiting ─► running ─► last delta               GENERATE
    submit ─► waiting ─► running ─► first token, ChunkDone ... release_lease      PREFILL
    submit ─► waiting ─► Reservation ... activate ─► running ─► last delta        DECODE, TAKEOVER
                                     └── abandon [─► recover]
    running ... start_handover ─► ChunkDone ... freeze ─► finish_handover         the other side of
                                                     └──► resume ─► running       TAKEOVER
    reserve_import ... finish_import │ abandon_import [─► recover]                blocks, no request

`step` schedules and launches one step and then waits for the one before, whose results it tells: a
runner that computes on a device of its own always has the next step at hand. With a runner that
computes while it launches, it is the launched step itself that is waited for.

       call 1              call 2                        call 3
    launch step 0    launch 1, wait for 0, tell    launch 2, wait for 1, tell ...

A request that ends while a step in flight computes it gets its last delta at once; its blocks are
released when that step is over. Until then the engine is not empty.

Single-threaded: every call comes from the engine's thread, between steps. A request ends with
exactly one delta that has a timeline, with two exceptions where the caller already knows: an
abandoned reservation, and an activated one whose first token was its last. That delta has no
finish_reason where another worker goes on: prefilled, or handed over.

Not known here: text, other workers, deadlines (the caller cancels), lease expiry.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as SequenceOf

from baton.core.block import BlockHash, BlockId
from baton.core.clock import Clock, MonotonicClock
from baton.core.errors import InternalError, InvalidRequest, NotFound, Overloaded
from baton.core.kv_layout import KvLayout
from baton.core.request import FinishReason, GenerateRequest, RequestId, TokenDelta, Work
from baton.core.worker_info import LoadReport
from baton.engine.batch import Batch, Runner, SampledToken
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.grammar.gate import Compiler, GrammarGate
from baton.engine.handoff import (
    ChunkDone,
    LayersDone,
    LeaseTable,
    Reservation,
    complete_partial_block,
)
from baton.engine.handover import HandoverTable
from baton.engine.imports import ImportTable
from baton.engine.in_flight import LaunchedSequence, StepsInFlight
from baton.engine.integrity import check_holders, check_sequence
from baton.engine.layer_notices import LayerNotices, LayerSink
from baton.engine.postprocess import (
    accept_token,
    check_arrived,
    check_request,
    end_delta,
    error_delta,
    refused_delta,
)
from baton.engine.prefix_cache import PrefixCacheStats, commit_computed, extend_hashes
from baton.engine.scheduler import Scheduler, SchedulerLimits
from baton.engine.sequence import Sequence, SequenceStatus
from baton.engine.sequence_times import SequenceTimes
from baton.engine.step_output import BatchOutcome, StepOutput
from baton.engine.step_shares import StepShares

__all__ = ["BatchOutcome", "ChunkDone", "Engine", "LayersDone", "Reservation", "StepOutput"]

logger = logging.getLogger(__name__)


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
        timer: Clock | None = None,
        grammars: Compiler | None = None,
    ) -> None:
        """`clock` gives wall-clock seconds: time points of several hosts are laid side by side.
        `timer` times steps; by default the monotonic clock. `grammars` compiles structured
        outputs; without it they are refused."""
        self._block_size = layout.block_size
        self._is_caching = config.enable_prefix_caching
        self._vocab_size = vocab_size
        self._times = SequenceTimes(clock)
        timer = timer or MonotonicClock()
        self._shares = StepShares(timer, num_ranks=config.tp_size)
        self._grammars = GrammarGate(grammars, timer)
        # A sequence that alone fills the pool must end there, or it would preempt itself for ever.
        self._max_num_tokens = min(max_model_len, num_blocks * layout.block_size)
        self._in_flight = StepsInFlight(runner)
        self._pool = BlockPool(num_blocks)
        self._leases = LeaseTable(self._pool)
        limits = SchedulerLimits(
            config.max_num_seqs, config.max_num_batched_tokens, config.max_num_waiting
        )
        self._scheduler = Scheduler(self._pool, block_size=layout.block_size, limits=limits)
        self._imports = ImportTable(self._pool)
        self._handovers = HandoverTable(
            self._pool, self._leases, self._scheduler, block_size=layout.block_size
        )
        self._layer_notices = LayerNotices(
            num_layers=layout.num_layers,
            num_groups=config.layer_notice_groups,
            min_tokens=config.layer_notice_min_tokens,
            block_size=layout.block_size,
        )
        self._saving: set[BlockId] = set()
        """Blocks that a tier is copying, each leased."""
        self._sequences: dict[RequestId, Sequence] = {}
        self._output = StepOutput()
        """What arose since the last step."""
        self._is_stalled = False
        """The last step could do nothing, and nothing has changed since."""

    @property
    def max_num_tokens(self) -> int:
        """Tokens of prompt and output together that one sequence can have here."""
        return self._max_num_tokens

    def set_limits(self, limits: SchedulerLimits) -> None:
        """Of all steps from the next one on."""
        self._scheduler.set_limits(limits)
        self._is_stalled = False

    def waiting_ids(self) -> tuple[RequestId, ...]:
        """Requests that hold no blocks: not begun, or preempted."""
        return tuple(sequence.request_id for sequence in self._scheduler.waiting())

    @property
    def has_work(self) -> bool:
        """True when `step` has something to compute, to wait for, to reserve or to deliver."""
        if self._output.says_something or self._in_flight or self._pool.has_events:
            return True
        if self._grammars.has_news:
            return True
        scheduler = self._scheduler
        return not self._is_stalled and bool(scheduler.running or scheduler.num_waiting)

    @property
    def is_empty(self) -> bool:
        """No sequence, no reservation, import or lease, no step in flight.

        Blocks that a tier is copying do not count: nobody waits for them.
        """
        is_held = self._sequences or self._leases or self._imports
        return not is_held and not self._in_flight

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        return self._scheduler.prefix_cache_stats

    def tell_layers(self, sink: LayerSink) -> None:
        """From now on `sink` hears how far the last chunks of PREFILL work are, while they are
        computed and on any thread. What it hears is a hint: `StepOutput.chunks` has what counts."""
        self._layer_notices.tell(sink)

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
        self._grammars.admit(sequence)
        try:
            self._scheduler.add(sequence)
        except Overloaded:
            self._grammars.forget(sequence)
            raise
        self._sequences[request.request_id] = sequence
        self._is_stalled = False
        self._times.queued(sequence)

    def activate(self, request_id: RequestId, first: TokenDelta) -> None:
        """The KV of a reserved sequence has arrived and is vouched for.

        `first` has what its owner sampled beyond the tokens the request came with: the first
        token of DECODE work, whose KV is not there yet; any number of tokens of TAKEOVER work,
        where the KV of the last known token is missing. They are not sent again; a timeline is
        taken over. When the request has ended meanwhile (cancelled, or with `first`), its blocks
        go to the prefix cache and nothing more is said.
        Raises NotFound when the request holds no reservation, InvalidRequest for what does not
        belong to it; nothing has changed then.
        """
        sequence = self._reserved(request_id)
        num_kv_tokens = check_arrived(
            sequence, first, block_size=self._block_size, vocab_size=self._vocab_size
        )
        num_blocks = -(-num_kv_tokens // self._block_size)
        table = sequence.block_table
        self._pool.mark_arrived(table[sequence.num_committed_blocks : num_blocks])
        self._pool.release(table[num_blocks:])
        sequence.block_table = table[:num_blocks]
        sequence.token_ids += first.token_ids
        sequence.num_computed_tokens = num_kv_tokens
        commit_computed(sequence, self._pool, self._block_size)
        self._is_stalled = False
        if sequence.is_abandoned or first.finish_reason is not None:
            self._forget(sequence)
            return
        if first.timeline is not None:
            sequence.timeline.merge(first.timeline)
        self._scheduler.join(sequence)
        if sequence.num_tokens >= sequence.max_num_tokens:
            self._end(sequence, end_delta(sequence, FinishReason.LENGTH))

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

    def lease_prefix(
        self, lease_id: RequestId, hashes: SequenceOf[BlockHash]
    ) -> tuple[BlockId, ...]:
        """Lease the longest leading part of a hash chain that is cached now.

        Empty: nothing of it is, and no lease exists. Raises InvalidRequest for an id in use.
        """
        if lease_id in self._sequences:
            raise InvalidRequest(f"lease {lease_id} has the id of a request here; use a new id")
        return self._leases.lease_prefix(lease_id, hashes)

    def release_lease(self, request_id: RequestId) -> None:
        """The reader is done, gave up, or its lease ran out. Idempotent.

        A handover that is not frozen is over with its lease; a frozen sequence stands still until
        `finish_handover` or `resume`.
        """
        self._leases.release(request_id)
        self._handovers.lease_ended(request_id)
        self._is_stalled = False

    def reserve_import(
        self, import_id: RequestId, hashes: SequenceOf[BlockHash]
    ) -> Reservation | None:
        """Blocks to read a chain into, before any request asks for it; see `imports`.

        None when nothing is missing or nothing fits. What running sequences write next and what
        the first waiting one wants is left to them. Raises InvalidRequest for an id in use.
        """
        if not self._is_caching:
            return None
        num_kept_back = self._scheduler.num_kept_back
        return self._imports.reserve(import_id, hashes, num_kept_back=num_kept_back)

    def finish_import(self, import_id: RequestId, *, num_blocks: int) -> None:
        """The first `num_blocks` blocks are valid, and cached from now on; the rest is freed.

        Raises NotFound, or InvalidRequest for more blocks than were reserved.
        """
        self._imports.finish(import_id, num_blocks)
        self._is_stalled = False

    def abandon_import(self, import_id: RequestId, *, unsettled: SequenceOf[BlockId]) -> None:
        """Give up an import; `unsettled` as in `abandon`. Raises NotFound, InvalidRequest."""
        self._imports.abandon(import_id, unsettled)
        self._is_stalled = False

    def start_handover(self, request_id: RequestId, *, num_known_tokens: int) -> None:
        """Announce the blocks of a running sequence from now on, those that are finished first.

        `num_known_tokens` output tokens need not be told with the last announcement. Raises
        NotFound for a request that does not generate here (waiting ones, after a preemption too),
        InvalidRequest for one that is leased already.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise NotFound(f"request {request_id} is not on this worker")
        self._tell(self._handovers.start(sequence, num_known_tokens))

    def freeze(self, request_id: RequestId) -> None:
        """Stop a sequence that is handed on; the last announcement comes when it stands still.

        Idempotent. Raises NotFound for a request that is not being handed on.
        """
        self._handovers.freeze(request_id)
        self._output.chunks += self._handovers.frozen_now()

    def resume(self, request_id: RequestId) -> None:
        """End a handover: the sequence goes on. Idempotent, in every state of the handover.

        Raises InternalError while a frozen sequence is leased: `release_lease` comes first.
        """
        self._handovers.resume(request_id)
        # What is not told yet of this handover would be taken for the next one's.
        output = self._output
        output.chunks = [c for c in output.chunks if c.request_id != request_id]
        output.handovers_ended = [r for r in output.handovers_ended if r != request_id]
        self._is_stalled = False

    def finish_handover(self, request_id: RequestId) -> None:
        """The reader has all of a frozen sequence: it ends here, its lease with it.

        Raises NotFound for a request that is not frozen.
        """
        sequence = self._handovers.frozen(request_id)
        self._handovers.drop(sequence)
        self._leases.release(request_id)
        self._end(sequence, TokenDelta(request_id, sequence.num_known_output_tokens))
        self._is_stalled = False

    def take_unsaved(self, max_blocks: int) -> list[tuple[BlockHash, BlockId]]:
        """The cached blocks that will be evicted first and that no tier has, coldest first.

        Each is leased until `release_saved`. At most half of what sequences could take, so that
        eviction need not wait for a tier.
        """
        num_spare = self._pool.num_available - self._scheduler.num_kept_back
        taken = self._pool.lease_unsaved(min(max_blocks, num_spare // 2))
        self._saving.update(block_id for _, block_id in taken)
        return taken

    def release_saved(self, block_ids: SequenceOf[BlockId], *, is_saved: bool) -> None:
        """The tier is done with these blocks, given in the order they were taken in.

        Saved ones are not offered again before they are used again. Raises NotFound, before
        anything has changed, when one of them was not taken.
        """
        if not self._saving.issuperset(block_ids) or len(set(block_ids)) < len(block_ids):
            raise NotFound(f"blocks {list(block_ids)} are not all being saved, or named twice")
        self._saving.difference_update(block_ids)
        self._pool.unlease_saved(block_ids, is_saved=is_saved)
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
            self._seal(sequence, delta)
        else:
            self._end(sequence, delta)
        self._is_stalled = False

    def step(self) -> StepOutput:
        """Schedule, launch, wait, tell. Returns at once when there is nothing to compute."""
        # A call that raised has not told what it had to tell.
        self._output.batch = BatchOutcome.NONE
        self._settle_grammars()
        if self._in_flight and self._scheduler.must_preempt:
            while self._in_flight:
                self._complete_oldest()
        schedule = self._scheduler.schedule()
        for sequence in schedule.preempted:
            self._end_handover(sequence)
        self._times.scheduled(schedule.started, schedule.reserved)
        self._output.reservations += map(_reservation, schedule.reserved)
        batch = schedule.batch
        if batch.scheduled:
            self._launch(batch)
        is_due = self._in_flight.is_full or (bool(self._in_flight) and not batch.scheduled)
        if is_due:
            self._complete_oldest()
        elif not batch.scheduled:
            self._grammars.pause()
        self._is_stalled = not (
            batch.scheduled or is_due or schedule.reserved or self._scheduler.running
        )
        output, self._output = self._output, StepOutput()
        output.stored, output.removed = self._pool.take_events()
        return output

    def load(self) -> LoadReport:
        scheduler, counts = self._scheduler, self._pool.counts
        in_memory = (*scheduler.running, *scheduler.frozen.values(), *scheduler.retiring)
        return LoadReport(
            num_running=len(scheduler.running) + len(scheduler.frozen),
            num_waiting=scheduler.num_waiting,
            queued_prefill_tokens=scheduler.num_queued_prefill_tokens,
            resident_kv_tokens=sum(s.num_computed_tokens for s in in_memory),
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            total_blocks=self._pool.num_blocks,
            leases=len(self._leases),
            reservations=len(scheduler.reserved) + len(self._imports),
            quarantined_blocks=counts.quarantined,
            num_preemptions=scheduler.num_preemptions,
            busy_seconds=self._shares.busy_s,
            num_steps=self._shares.num_steps,
        )

    def is_cached(self, block_hash: BlockHash) -> bool:
        """Whether a new request could match the block now."""
        return self._pool.has(block_hash)

    def cached_hashes(self) -> list[BlockHash]:
        """Every hash that a new request could match now."""
        return self._pool.cached_hashes()

    def check_integrity(self) -> None:
        """Recount blocks, holders and leases; raises InternalError on the first broken law."""
        self._pool.check_integrity()
        scheduler = self._scheduler
        known = [*scheduler.sequences()]
        if Counter(map(id, known)) != Counter(map(id, self._sequences.values())):
            raise InternalError("scheduler and engine disagree on which sequences exist")
        holders = [*known, *scheduler.retiring]
        for sequence in holders:
            check_sequence(sequence, self._block_size)
        tables = [*(s.block_table for s in holders), *self._imports.tables()]
        check_holders(self._pool.blocks(), tables, [*self._leases.block_ids(), *self._saving])
        self._handovers.check_integrity(known)
        self._in_flight.check_integrity(holders)

    def _reserved(self, request_id: RequestId) -> Sequence:
        sequence = self._scheduler.reserved.get(request_id)
        if sequence is None:
            raise NotFound(f"request {request_id} holds no reservation on this worker")
        return sequence

    def _launch(self, batch: Batch) -> None:
        started_at_s = self._shares.now()
        try:
            self._in_flight.launch(self._layer_notices.marked(batch))
        except Exception as error:
            self._fail([sequence for sequence, _ in batch.scheduled], error)
            return
        self._shares.launched(started_at_s)

    def _complete_oldest(self) -> None:
        """Wait for the oldest step in flight and tell what came of it."""
        output = self._output
        try:
            outcomes = self._in_flight.wait()
        except Exception as error:
            self._fail([], error)
            return
        if output.batch is BatchOutcome.NONE:
            output.batch = BatchOutcome.COMPUTED
        self._scheduler.release_retired()
        self._shares.over(
            (sequence, num_new_tokens)
            for (sequence, num_new_tokens, _), _ in outcomes
            if sequence.status is SequenceStatus.RUNNING
        )
        self._postprocess(outcomes)
        output.chunks += self._handovers.frozen_now()

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        """End `sequences` and everything in flight: nobody knows what the device has computed."""
        sequences = list(dict.fromkeys((*sequences, *self._in_flight.abort())))
        self._shares.aborted()
        logger.error("a step of %d sequences failed", len(sequences), exc_info=error)
        self._output.batch = BatchOutcome.FAILED
        self._scheduler.release_retired()
        for sequence in sequences:
            if sequence.status is SequenceStatus.RUNNING:
                self._end(sequence, error_delta(sequence, error))

    def _postprocess(self, outcomes: list[tuple[LaunchedSequence, SampledToken | None]]) -> None:
        deltas, is_handing_on = self._output.deltas, len(self._handovers) > 0
        for (sequence, _, samples), sampled in outcomes:
            if sequence.status is not SequenceStatus.RUNNING:
                # It ended after the launch; its row was computed for nothing.
                continue
            commit_computed(sequence, self._pool, self._block_size)
            if sampled is not None and sampled.prompt_logprobs:
                sequence.prompt_logprobs += sampled.prompt_logprobs
            delta = accept_token(sequence, sampled) if samples and sampled is not None else None
            if delta is not None and delta.finish_reason is FinishReason.ERROR:
                self._end(sequence, delta)
                continue
            if delta is not None and not sequence.has_emitted:
                self._times.first_token(sequence)
                delta.prompt_logprobs = tuple(sequence.prompt_logprobs)
                sequence.prompt_logprobs.clear()
            is_over = delta is not None and delta.finish_reason is not None
            if sequence.work is Work.PREFILL:
                is_over = delta is not None
                self._tell(self._announce_prefill(sequence, delta))
            elif is_handing_on and not is_over:
                self._tell(self._handovers.announce(sequence))
            if delta is None:
                continue
            if is_over:
                self._end(sequence, delta)
                continue
            if not sequence.has_emitted:
                sequence.has_emitted = True
                delta.num_cached_tokens = sequence.num_cached_tokens
            deltas.append(delta)

    def _announce_prefill(self, sequence: Sequence, first: TokenDelta | None) -> ChunkDone | None:
        if first is None:
            return self._leases.announce(sequence, sequence.num_committed_blocks)
        num_blocks = complete_partial_block(sequence, self._pool, self._block_size)
        return self._leases.announce(sequence, num_blocks, first)

    def _tell(self, chunk: ChunkDone | None) -> None:
        if chunk is not None:
            self._output.chunks.append(chunk)

    def _end(self, sequence: Sequence, delta: TokenDelta) -> None:
        """Send the last delta of a sequence and forget it."""
        self._seal(sequence, delta)
        self._forget(sequence)

    def _seal(self, sequence: Sequence, delta: TokenDelta) -> None:
        self._grammars.forget(sequence)
        self._times.ended(sequence)
        delta.num_cached_tokens = sequence.num_cached_tokens
        delta.timeline = sequence.timeline
        self._output.deltas.append(delta)

    def _settle_grammars(self) -> None:
        for sequence, error in self._grammars.settle():
            if sequence.status is SequenceStatus.RESERVED:
                # Its blocks may be being read to: the caller ends the reservation.
                sequence.is_abandoned = True
                self._seal(sequence, refused_delta(sequence, error))
            else:
                self._end(sequence, refused_delta(sequence, error))

    def _forget(self, sequence: Sequence) -> None:
        self._grammars.forget(sequence)
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        self._end_handover(sequence)

    def _end_handover(self, sequence: Sequence) -> None:
        if self._handovers.drop(sequence):
            self._output.handovers_ended.append(sequence.request_id)


def _reservation(sequence: Sequence) -> Reservation:
    return Reservation(
        sequence.request_id, tuple(sequence.block_table), sequence.num_committed_blocks
    )
