"""The reader's side of the hand-off for one request, as a pure state machine.

 1. start      Watch(request) to the owner; what it announces is remembered and its lease kept
               alive, however long our own blocks take to come                    -> WATCHING
 2. reserved   the blocks to read into are here                                   -> WAITING
 3. chunk      its blocks, less those held already, queue up; none in flight: read them all at
               once                                                               -> READING
 4. read done  more queued: the next read; the prompt not all announced: wait     -> WAITING
               everything read: Complete(lease, epoch)                            -> COMPLETING
 5. completed  valid: the blocks may become active; not valid: LeaseLost          -> ENDED
 x. any state  cancel, refusal, deadline, dead owner, lost lease: Fail with the blocks a read may
               still write to                                                     -> ENDED

One read is in flight at most, and chunks that finish meanwhile become one larger read. The lease
is renewed at a third of its term; the reader stops trusting it before the owner would, at
`LEASE_TRUST` of the term after the last message that kept it alive.

Knows no transport, no stream and no clock: times come in, effects go out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from baton.core.block import BlockId
from baton.core.errors import (
    BatonError,
    LeaseLost,
    PeerGone,
    RequestCancelled,
    TransferError,
    TransferTimeout,
)
from baton.core.lifecycle import TransferStats
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.messages import (
    ChunkReady,
    Complete,
    GiveUp,
    LeaseId,
    ReaderMessage,
    Renew,
    Watch,
)
from kvtransfer.transport import ReadStats

LEASE_RENEWAL = 1 / 3
LEASE_TRUST = 0.8
MAX_WAIT_TERMS = 4
"""Lease terms during which the owner's blocks are held while ours do not come. Without a limit two
full pools could wait for each other: theirs held for requests that wait for ours, and ours held
for requests whose prompts wait for theirs."""


class FetchState(Enum):
    WATCHING = "watching"
    WAITING = "waiting"
    READING = "reading"
    COMPLETING = "completing"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reader was told to fetch."""

    request_id: RequestId
    peer: WorkerId
    epoch: Epoch
    """Of the peer at connect; chunks of another are not what we are connected to."""
    deadline_s: float
    """On the caller's clock."""


@dataclass(frozen=True, slots=True)
class TransferResult:
    """The prompt's KV is here and was valid."""

    request_id: RequestId
    first_token: TokenDelta | None
    """As the owner sent it; not looked into here."""
    stats: TransferStats
    started_at_s: float
    """When the blocks to read into were here."""
    ended_at_s: float


@dataclass(frozen=True, slots=True)
class TransferFailure:
    """The prompt's KV will not come. `error` is a TransferError, or RequestCancelled."""

    request_id: RequestId
    error: BatonError
    unsettled: tuple[BlockId, ...]
    """Blocks a read may still write to; all others may be reused at once."""


@dataclass(frozen=True, slots=True)
class ToOwner:
    """Effect: send `message` to the owner."""

    message: ReaderMessage


@dataclass(frozen=True, slots=True)
class StartRead:
    """Effect: read the owner's blocks `remote[i]` into ours `local[i]`."""

    remote: tuple[BlockId, ...]
    local: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class StopRead:
    """Effect: give up on the read in flight."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Effect, the last one: the outcome."""

    outcome: TransferResult | TransferFailure


FetchEffect = ToOwner | StartRead | StopRead | Finish


@dataclass(slots=True, eq=False)
class FetchMachine:
    """One request. Every method returns the effects to apply, in order."""

    expected: Expected
    link_grace_s: float
    """How long a broken stream to the owner may take to come back."""
    state: FetchState = FetchState.WATCHING
    stats: TransferStats = field(default_factory=TransferStats)
    _local: tuple[BlockId, ...] = ()
    """Our blocks for the whole prompt, by position; empty before `reserved`."""
    _reserved_at_s: float = 0.0
    _remote: list[BlockId] = field(default_factory=list)
    """The owner's blocks announced so far, by position."""
    _num_requested: int = 0
    """Positions that are cached, read or in flight."""
    _in_flight: tuple[BlockId, ...] = ()
    _read_started_s: float = 0.0
    _lease_id: LeaseId | None = None
    _lease_s: float = 0.0
    _lease_granted_s: float = 0.0
    _lease_kept_s: float = 0.0
    """When the lease was granted or last renewed."""
    _announced_all_s: float | None = None
    _first_token: TokenDelta | None = None
    _link_lost_s: float | None = None

    def start(self) -> list[FetchEffect]:
        return [ToOwner(Watch(self.expected.request_id))]

    def reserved(
        self, local: tuple[BlockId, ...], num_cached_blocks: int, now_s: float
    ) -> list[FetchEffect]:
        """Our blocks for the whole prompt; the first `num_cached_blocks` are valid and not read."""
        if self.state is not FetchState.WATCHING:
            return []
        self.state = FetchState.WAITING
        self._local, self._reserved_at_s = local, now_s
        if not 0 <= num_cached_blocks <= len(local):
            return self._fail(TransferError(f"{num_cached_blocks} cached of {len(local)}"), now_s)
        self._num_requested = num_cached_blocks
        misfit = self._misfit()
        return self._fail(TransferError(misfit), now_s) if misfit else self._advance(now_s)

    def chunk_ready(self, chunk: ChunkReady, now_s: float) -> list[FetchEffect]:
        """Announcements may repeat after a reconnect; they may not have gaps."""
        if self.state in (FetchState.ENDED, FetchState.COMPLETING):
            return []
        if chunk.epoch != self.expected.epoch or self._lease_id not in (None, chunk.lease_id):
            return self._fail(LeaseLost("the owner restarted or granted another lease"), now_s)
        if chunk.first_block_index > len(self._remote):
            gap = f"chunk of block {chunk.first_block_index} does not continue {len(self._remote)}"
            return self._fail(TransferError(gap), now_s)
        if self._lease_id is None:
            self._lease_granted_s = now_s
        self._lease_id, self._lease_s, self._lease_kept_s = chunk.lease_id, chunk.lease_s, now_s
        self._remote += chunk.block_ids[len(self._remote) - chunk.first_block_index :]
        if chunk.is_last and self._announced_all_s is None:
            self._announced_all_s, self._first_token = now_s, chunk.first_token
        misfit = self._misfit()
        return self._fail(TransferError(misfit), now_s) if misfit else self._advance(now_s)

    def read_done(self, read: ReadStats, now_s: float) -> list[FetchEffect]:
        if self.state is not FetchState.READING:
            return []
        self.stats.num_bytes += read.num_bytes
        self.stats.num_blocks += len(self._in_flight)
        self.stats.num_reads += 1
        self.stats.seconds += now_s - self._read_started_s
        self._in_flight = ()
        self.state = FetchState.WAITING
        return self._advance(now_s)

    def read_failed(self, error: TransferError, now_s: float) -> list[FetchEffect]:
        """A read that passed its deadline may still land; any other error means it cannot."""
        if self.state is not FetchState.READING:
            return []
        if not isinstance(error, TransferTimeout):
            self._in_flight = ()
        # The transport is done with this read: there is nothing left to stop.
        return self._fail(error, now_s, stop_read=False)

    def completed(self, lease_id: LeaseId, *, valid: bool, now_s: float) -> list[FetchEffect]:
        if self.state is not FetchState.COMPLETING or lease_id != self._lease_id:
            return []
        if not valid:
            return self._fail(LeaseLost("the lease ended before the read was validated"), now_s)
        self.state = FetchState.ENDED
        if self.stats.num_reads and self._announced_all_s is not None:
            self.stats.exposed_seconds = now_s - max(self._announced_all_s, self._reserved_at_s)
        return [
            Finish(
                TransferResult(
                    self.expected.request_id,
                    self._first_token,
                    self.stats,
                    self._reserved_at_s,
                    now_s,
                )
            )
        ]

    def refused(self, reason: str, now_s: float) -> list[FetchEffect]:
        return self._fail(LeaseLost(f"the owner refused: {reason}"), now_s, tell_owner=False)

    def cancel(self, reason: str, now_s: float) -> list[FetchEffect]:
        return self._fail(RequestCancelled(reason), now_s)

    def link_lost(self, now_s: float) -> list[FetchEffect]:
        """The stream to the owner broke; reads go on, the owner keeps the lease for a while."""
        if self._link_lost_s is None:
            self._link_lost_s = now_s
        return self.tick(now_s)

    def link_restored(self, now_s: float) -> list[FetchEffect]:
        """A new stream to the same process. Ask again for what may have been lost."""
        if self.state is FetchState.ENDED:
            return []
        self._link_lost_s = None
        if self.state is FetchState.COMPLETING:
            return [ToOwner(self._complete_message())]
        return [ToOwner(Watch(self.expected.request_id)), *self.tick(now_s)]

    def peer_gone(self, error: PeerGone, now_s: float) -> list[FetchEffect]:
        """The owner is known to be dead; a read in flight learns it from the transport."""
        if self.state is FetchState.READING:
            return []
        return self._fail(error, now_s, tell_owner=False)

    def tick(self, now_s: float) -> list[FetchEffect]:
        """Let time pass: deadline, lease, broken link."""
        if self.state is FetchState.ENDED:
            return []
        if now_s >= self.expected.deadline_s:
            late = f"KV of {self.expected.request_id} did not arrive in time ({self.state.value})"
            return self._fail(TransferTimeout(late), now_s)
        if self._link_lost_s is not None:
            if now_s - self._link_lost_s < self.link_grace_s:
                return []
            gone = f"no stream to {self.expected.peer} for {self.link_grace_s:g} s"
            return self._fail(PeerGone(gone), now_s, tell_owner=False)
        if self._lease_id is None:
            return []
        age_s = now_s - self._lease_kept_s
        if age_s > self._lease_s * LEASE_TRUST:
            stale = f"lease not renewed for {age_s:.1f} of its {self._lease_s:g} s"
            return self._fail(LeaseLost(stale), now_s)
        if self.state is FetchState.WATCHING:
            waited_s = now_s - self._lease_granted_s
            if waited_s >= self._lease_s * MAX_WAIT_TERMS:
                long = f"no free blocks here for {waited_s:.0f} s after the prompt was computed"
                return self._fail(LeaseLost(long), now_s)
        if age_s >= self._lease_s * LEASE_RENEWAL:
            self._lease_kept_s = now_s
            return [ToOwner(Renew(self._lease_id))]
        return []

    def check_integrity(self) -> None:
        """Raises AssertionError when the counts contradict the state."""
        assert bool(self._in_flight) == (self.state is FetchState.READING) or (
            self.state is FetchState.ENDED
        )
        assert self.state is FetchState.ENDED or not self._misfit()
        assert self._num_requested <= len(self._local)
        if self.state is FetchState.WATCHING:
            assert not self._local
        if self.state is FetchState.COMPLETING:
            assert self._lease_id is not None and self._is_all_requested

    @property
    def _is_all_requested(self) -> bool:
        return self._announced_all_s is not None and self._num_requested == len(self._remote)

    def _misfit(self) -> str:
        """How the announced blocks contradict the reserved ones; empty while they do not."""
        announced, wanted = len(self._remote), len(self._local)
        is_all = self._announced_all_s is not None
        if self.state is FetchState.WATCHING or announced == wanted:
            return ""
        if announced < wanted and not is_all:
            return ""
        return f"the owner announced {announced} blocks, {wanted} are expected"

    def _advance(self, now_s: float) -> list[FetchEffect]:
        """Start the next read, or ask for the verdict after the last one."""
        if self.state is not FetchState.WAITING:
            return []
        first, end = self._num_requested, len(self._remote)
        if first < end:
            self._num_requested = end
            self._in_flight = self._local[first:end]
            self._read_started_s = now_s
            self.state = FetchState.READING
            return [StartRead(tuple(self._remote[first:end]), self._in_flight)]
        if self._announced_all_s is None:
            return []
        self.state = FetchState.COMPLETING
        return [ToOwner(self._complete_message())]

    def _complete_message(self) -> Complete:
        assert self._lease_id is not None
        return Complete(self._lease_id, self.expected.epoch)

    def _fail(
        self, error: BatonError, now_s: float, *, tell_owner: bool = True, stop_read: bool = True
    ) -> list[FetchEffect]:
        if self.state is FetchState.ENDED:
            return []
        was_reading = self.state is FetchState.READING
        self.state = FetchState.ENDED
        effects: list[FetchEffect] = []
        if tell_owner:
            effects.append(ToOwner(GiveUp(self.expected.request_id, str(error))))
        if was_reading and stop_read:
            effects.append(StopRead())
        failure = TransferFailure(self.expected.request_id, error, self._in_flight)
        return [*effects, Finish(failure)]
