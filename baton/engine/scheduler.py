"""Which sequences compute how many tokens in the next step, and who gets blocks for it.

One call of `schedule` decides, in this order:

1. grow      running sequences take the one block their next token may need; when none is left,
             the latest arrival is preempted: its blocks go, it waits and is computed again
2. decode    every running sequence with one token to compute
3. prefill   running sequences with more, first come first served, in chunks of what is left
4. admit     waiting sequences in order of arrival, with blocks for all their known tokens; work
             whose KV comes from elsewhere is RESERVED and costs neither tokens nor a place

Decisions run ahead of results: a running sequence whose last step is still in flight is taken to
go on, unless the pending token is its last by number (`Sequence.is_ending`). Where it did end, the
row computed for it is wasted, and its blocks stay out of use until that step is over (`retiring`).
Nothing may be in flight when a sequence is preempted: see `must_preempt`.

A sequence short of blocks stops all later arrivals, so nobody starves; one that only lacks tokens
or a place in this step lets reservations pass. PREFILL work holds all its blocks from admission
and is never preempted (a reader depends on it), nor are reservations (a read may be in flight) or
frozen sequences (another worker may be about to go on with them).

A sequence whose grammar is being compiled computes all its tokens but the last.

Not known here: KV bytes, time, deltas, leases.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from baton.core.block import BlockId
from baton.core.errors import Overloaded
from baton.core.request import RequestId, Work
from baton.engine.batch import Batch, ScheduledSequence
from baton.engine.block_pool import BlockPool
from baton.engine.prefix_cache import PrefixCacheStats, is_read_remotely, match_prefix
from baton.engine.sequence import Sequence, SequenceStatus

TAKEOVER_SLACK_TOKENS = 64
"""A sequence that is taken over goes on growing at its owner; this much more than was known of it
is provided for, at least a second of decoding."""
KEPT_BACK_BLOCKS = 2
"""For each sequence that grows: the block it takes next and one more, so that what is only of use
later does not cause a preemption while it is on its way."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of one step and of the queue, see EngineConfig."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_waiting: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """The outcome of one decision."""

    batch: Batch
    started: tuple[Sequence, ...]
    """Sequences that compute for the first time; a preempted one has started already."""
    reserved: tuple[Sequence, ...]
    """Sequences whose blocks are held from now on, waiting for their KV."""
    preempted: tuple[Sequence, ...] = ()
    """Sequences that lost their blocks and wait again."""


class Scheduler:
    def __init__(self, pool: BlockPool, *, block_size: int, limits: SchedulerLimits) -> None:
        self._pool = pool
        self._block_size = block_size
        self._limits = limits
        self.running: list[Sequence] = []
        """In the order they began to run. Only the first max_num_seqs compute; the rest arrived
        from other workers while all places were taken and wait with their KV in memory."""
        self.reserved: dict[RequestId, Sequence] = {}
        self.frozen: dict[RequestId, Sequence] = {}
        self.retiring: list[Sequence] = []
        """Gone but for their blocks, to which a step in flight writes."""
        self._to_compute: OrderedDict[RequestId, Sequence] = OrderedDict()
        self._to_reserve: OrderedDict[RequestId, Sequence] = OrderedDict()
        self._preempted: dict[RequestId, Sequence] = {}
        self._preempted_now: list[Sequence] = []
        """In the decision being made."""
        self._num_arrived = 0
        self._num_queued_tokens = 0
        self._num_query_tokens = 0
        self._num_hit_tokens = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._to_compute) + len(self._to_reserve) + len(self._preempted)

    @property
    def num_queued_prefill_tokens(self) -> int:
        """Tokens to compute before their sequences can sample: waiting and running."""
        num_tokens = self._num_queued_tokens
        for sequence in self.running:
            num_left = sequence.num_tokens - sequence.num_computed_tokens
            if num_left > 1:
                num_tokens += num_left
        return num_tokens

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(self._num_query_tokens, self._num_hit_tokens)

    @property
    def num_kept_back(self) -> int:
        """Available blocks that only sequences may take: those that grow, and the first in line."""
        first = self._first_waiting(can_compute=True)
        num_wanted = self._num_wanted_blocks(first) if first is not None else 0
        return KEPT_BACK_BLOCKS * self._num_growing() + num_wanted

    def set_limits(self, limits: SchedulerLimits) -> None:
        """From the next step on; sequences beyond them finish as those that were reserved do."""
        self._limits = limits

    def waiting(self) -> Iterator[Sequence]:
        """Sequences without blocks."""
        for queue in (self._preempted, self._to_compute, self._to_reserve):
            yield from queue.values()

    def sequences(self) -> Iterator[Sequence]:
        """All but the retiring ones, in no particular order."""
        yield from self.running
        queues = (self._preempted, self._to_compute, self._to_reserve)
        for others in (self.reserved, self.frozen, *queues):
            yield from others.values()

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises Overloaded when the queue is full."""
        if self.num_waiting >= self._limits.max_num_waiting:
            raise Overloaded(
                f"{self.num_waiting} requests wait on this worker, the limit is "
                f"{self._limits.max_num_waiting}; retry later"
            )
        sequence.arrival_index = self._num_arrived
        self._num_arrived += 1
        if is_read_remotely(sequence):
            self._to_reserve[sequence.request_id] = sequence
        else:
            self._to_compute[sequence.request_id] = sequence
            self._num_queued_tokens += sequence.num_tokens

    def join(self, sequence: Sequence) -> None:
        """A reserved sequence has all its KV and its first token: RESERVED → RUNNING."""
        del self.reserved[sequence.request_id]
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def freeze(self, sequence: Sequence) -> None:
        """RUNNING → FROZEN, with nothing in flight."""
        assert not sequence.num_in_flight_tokens, "a step in flight writes to its blocks"
        self.running.remove(sequence)
        sequence.status = SequenceStatus.FROZEN
        self.frozen[sequence.request_id] = sequence

    def resume(self, sequence: Sequence) -> None:
        """FROZEN → RUNNING, whether there is a place or not, as with `join`."""
        del self.frozen[sequence.request_id]
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its status, and release its blocks.

        While a step in flight computes it, the blocks stay for `release_retired`.
        """
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.RESERVED:
            del self.reserved[sequence.request_id]
        elif sequence.status is SequenceStatus.FROZEN:
            del self.frozen[sequence.request_id]
        elif sequence.status is SequenceStatus.WAITING:
            self._dequeue(sequence)
        if sequence.num_in_flight_tokens:
            sequence.status = SequenceStatus.RETIRING
            self.retiring.append(sequence)
        else:
            sequence.status = SequenceStatus.FINISHED
            self._release_blocks(sequence)

    def release_retired(self) -> None:
        """A step is over: release the blocks of sequences that only waited for it."""
        if not self.retiring:
            return
        waiting = [s for s in self.retiring if s.num_in_flight_tokens]
        for sequence in self.retiring:
            if not sequence.num_in_flight_tokens:
                sequence.status = SequenceStatus.FINISHED
                self._release_blocks(sequence)
        self.retiring = waiting

    @property
    def must_preempt(self) -> bool:
        """True when `schedule` would preempt: running sequences need more blocks than there are.

        Steps in flight must be waited for first: a preempted sequence's blocks change hands, and
        its tokens are computed again from their values.
        """
        num_available = self._pool.num_available
        if num_available >= len(self.running):
            return False
        return sum(map(self._needs_block, self._active())) > num_available

    def schedule(self) -> Schedule:
        """Decide one step and take the blocks it needs. The batch may be empty."""
        self._preempted_now = []
        active = self._active()
        for sequence in active:
            if sequence.status is SequenceStatus.RUNNING:
                self._grow(sequence)
        scheduled = self._schedule_running(active)
        reserved = self._admit(scheduled) if self.num_waiting else []
        started = tuple(s for s, _ in scheduled if not s.has_started)
        for sequence in started:
            sequence.has_started = True
        batch = Batch(tuple(scheduled))
        return Schedule(batch, started, tuple(reserved), tuple(self._preempted_now))

    def _active(self) -> list[Sequence]:
        """Running sequences that may compute in this step."""
        going_on = [s for s in self.running if s.may_go_on]
        return going_on[: self._limits.max_num_seqs]

    def _num_growing(self) -> int:
        """Sequences that hold blocks and will want more."""
        growing = (s for s in self.running if not s.is_ending and s.work is not Work.PREFILL)
        return len(self.reserved) + len(self.frozen) + sum(1 for _ in growing)

    def _needs_block(self, sequence: Sequence) -> bool:
        return sequence.num_computed_tokens >= len(sequence.block_table) * self._block_size

    def _grow(self, sequence: Sequence) -> None:
        """Give `sequence` a block for its next token, or preempt until it has one or is gone."""
        if not self._needs_block(sequence):
            return
        while not self._pool.num_available:
            victim = self._latest_preemptable()
            self._preempt(victim)
            if victim is sequence:
                return
        table = sequence.block_table
        table += self._pool.allocate(1, after=table[-1])

    def _latest_preemptable(self) -> Sequence:
        candidates = (s for s in self.running if s.work is not Work.PREFILL)
        return max(candidates, key=lambda s: s.arrival_index)

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.num_in_flight_tokens, "a step in flight writes to its blocks"
        self.running.remove(sequence)
        self._release_blocks(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_committed_blocks = 0
        sequence.prompt_logprobs.clear()
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted_now.append(sequence)
        self._preempted[sequence.request_id] = sequence
        self._num_queued_tokens += sequence.num_tokens

    def _schedule_running(self, active: list[Sequence]) -> list[ScheduledSequence]:
        decodes: list[ScheduledSequence] = []
        prefills: list[Sequence] = []
        for sequence in active:
            if sequence.status is not SequenceStatus.RUNNING:
                continue
            if sequence.num_tokens_to_compute == 1:
                decodes.append(ScheduledSequence(sequence, 1))
            else:
                prefills.append(sequence)
        budget = self._limits.max_num_batched_tokens - len(decodes)
        for sequence in prefills:
            num_new_tokens = min(sequence.num_tokens_to_compute, budget)
            if not num_new_tokens:
                break
            decodes.append(ScheduledSequence(sequence, num_new_tokens))
            budget -= num_new_tokens
        return decodes

    def _admit(self, scheduled: list[ScheduledSequence]) -> list[Sequence]:
        """Admit in order of arrival: appends to `scheduled`, returns those that are reserved."""
        budget = self._limits.max_num_batched_tokens - sum(n for _, n in scheduled)
        reserved: list[Sequence] = []
        num_growing = self._num_growing()
        num_places = self._limits.max_num_seqs - sum(s.may_go_on for s in self.running)
        while True:
            has_place = budget > 0 and num_places > 0
            sequence = self._first_waiting(can_compute=has_place)
            if sequence is None or not self._take_blocks(sequence, num_growing):
                return reserved
            self._dequeue(sequence)
            num_growing += sequence.work is not Work.PREFILL
            if is_read_remotely(sequence):
                sequence.status = SequenceStatus.RESERVED
                self.reserved[sequence.request_id] = sequence
                reserved.append(sequence)
                continue
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            num_places -= 1
            num_new_tokens = min(sequence.num_tokens_to_compute, budget)
            if num_new_tokens:
                scheduled.append(ScheduledSequence(sequence, num_new_tokens))
            budget -= num_new_tokens

    def _first_waiting(self, *, can_compute: bool) -> Sequence | None:
        """The earliest arrival that this step could take if it had the blocks."""
        heads: list[Sequence] = []
        if can_compute:
            heads += self._preempted.values()
            heads += islice(self._to_compute.values(), 1)
        heads += islice(self._to_reserve.values(), 1)
        return min(heads, key=lambda s: s.arrival_index, default=None)

    def _take_blocks(self, sequence: Sequence, num_growing: int) -> bool:
        """Take blocks for all known tokens, cached ones first, or none at all.

        One block for each sequence that will grow stays available, so that an admission does not
        cause a preemption in the next step.
        """
        pool = self._pool
        matched = match_prefix(sequence, pool, self._block_size)
        num_missing = self._num_wanted_blocks(sequence) - len(matched)
        num_available = pool.num_available - pool.num_cached_among(matched)
        if num_missing + num_growing > num_available:
            return False
        pool.acquire(matched)
        last: BlockId | None = matched[-1] if matched else None
        missing = pool.allocate(num_missing, after=last, is_reserved=is_read_remotely(sequence))
        sequence.block_table = matched + missing
        sequence.num_committed_blocks = len(matched)
        sequence.num_computed_tokens = len(matched) * self._block_size
        self._count_hits(sequence)
        return True

    def _num_wanted_blocks(self, sequence: Sequence) -> int:
        """Blocks to hold from admission on."""
        num_tokens = sequence.num_tokens
        if sequence.work is Work.TAKEOVER and is_read_remotely(sequence):
            num_tokens = min(num_tokens + TAKEOVER_SLACK_TOKENS, sequence.max_num_tokens)
        return -(-num_tokens // self._block_size)

    def _count_hits(self, sequence: Sequence) -> None:
        if sequence.num_preemptions:
            return
        hit = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        sequence.num_cached_tokens = hit
        self._num_query_tokens += sequence.num_prompt_tokens
        self._num_hit_tokens += hit

    def _dequeue(self, sequence: Sequence) -> None:
        if self._to_reserve.pop(sequence.request_id, None) is not None:
            return
        queue = self._preempted if sequence.num_preemptions else self._to_compute
        del queue[sequence.request_id]
        self._num_queued_tokens -= sequence.num_tokens

    def _release_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = []
