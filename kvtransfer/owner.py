"""The owner's side of the hand-off: announces finished chunks under a lease, and takes it back.

Life cycle of one request here (the reader's side is `fetch_state`):

 1. WATCHED  a reader asked for the request, nothing is computed yet
 2. LEASED   first chunk done: its blocks go under a lease; every further chunk extends it.
             Entered without a reader too: the watch may come later and gets all chunks at once
 3. FILLED   the last chunk is announced, the reader has what is left of the lease
 4. the reader completes: the lease was valid until now, the blocks go back to the engine, gone
 x. ENDED    the lease is over (gave up, expired, failed, completed early) while the engine may
             still compute: later chunks are given back the moment they are done

Pure state machine: events in, effects out, the clock passed in. Does no I/O, knows neither gRPC
nor the engine; the shell sends and calls `release_lease`. A lost stream alone takes nothing away:
the leases of that reader run until they expire. Everything kept here has a time limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from baton.core.block import BlockId
from baton.core.clock import Clock
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch
from kvtransfer.lease import Lease, LeaseTable
from kvtransfer.messages import (
    ChunkReady,
    Complete,
    Completed,
    GiveUp,
    LeaseId,
    OwnerMessage,
    ReaderMessage,
    Refused,
    Renew,
    Watch,
)

ReaderId = NewType("ReaderId", str)
"""One stream of one reader, named by the shell; a reconnected stream may use the same name."""


@dataclass(frozen=True, slots=True)
class OwnerLimits:
    """How long and how much an owner keeps for readers."""

    lease_s: float = 30.0
    """Term of a lease. Renewed by the reader at a third of it, so two lost renewals are fine."""
    watch_s: float = 120.0
    """A watch for a request of which nothing is computed is refused after this; it bounds
    the time a prompt may queue here, while its reader may hold blocks."""
    ended_s: float = 120.0
    """How long an ended request's late chunks are still recognised."""
    max_watches: int = 4096
    max_ended: int = 4096


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: hand `message` to the reader's stream, dropping it when the stream is gone."""

    reader: ReaderId
    message: OwnerMessage


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """Effect: the engine may reuse all blocks announced so far. Safe to apply twice."""

    request_id: RequestId
    reason: str


OwnerEffect = Send | ReleaseLease


class OwnedState(Enum):
    WATCHED = "watched"
    LEASED = "leased"
    FILLED = "filled"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class _Owned:
    request_id: RequestId
    state: OwnedState
    since_s: float
    reader: ReaderId | None = None
    lease_id: LeaseId | None = None
    block_ids: list[BlockId] = field(default_factory=list)
    first_token: TokenDelta | None = None
    reason: str = ""
    is_computed: bool = False
    """The engine announces nothing more for this request."""
    is_told: bool = False
    """Only ENDED: the reader knows. With `is_computed` too there is nothing left to remember."""


class LeaseOwner:
    """All hand-offs of one prefill worker. Every method returns the effects to apply, in order."""

    def __init__(self, *, epoch: Epoch, clock: Clock, limits: OwnerLimits | None = None) -> None:
        self._epoch = epoch
        self._clock = clock
        self._limits = limits or OwnerLimits()
        self._leases = LeaseTable(clock=clock, epoch=epoch, lease_s=self._limits.lease_s)
        self._requests: dict[RequestId, _Owned] = {}

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_watches(self) -> int:
        return len(self._in_state(OwnedState.WATCHED))

    @property
    def is_empty(self) -> bool:
        """No lease is live and no reader waits."""
        return not self._leases and not self.num_watches

    def chunk_done(
        self,
        request_id: RequestId,
        *,
        first_block_index: int,
        block_ids: Sequence[BlockId],
        is_last: bool,
        first_token: TokenDelta | None,
    ) -> list[OwnerEffect]:
        """The engine finished a chunk and counts a lease on each of its blocks."""
        effects = self.tick()
        owned = self._requests.get(request_id)
        if owned is not None and owned.is_computed and first_block_index == 0:
            # The same request was submitted again; what is left of its first life is over.
            effects += self._end(owned, "computed again", is_told=True)
            owned = None
        if owned is None and first_block_index == 0:
            owned = self._add(request_id, OwnedState.LEASED)
        if owned is None or owned.state is OwnedState.ENDED:
            effects.append(ReleaseLease(request_id, owned.reason if owned else "unknown request"))
            if owned is not None:
                owned.is_computed |= is_last
                self._forget_if_over(owned)
            return effects
        if first_block_index != len(owned.block_ids):
            gap = f"chunk starts at block {first_block_index}, expected {len(owned.block_ids)}"
            effects += self._refuse(owned, gap)
            return [*effects, ReleaseLease(request_id, gap)]
        return effects + self._announce(owned, block_ids, is_last, first_token)

    def receive(self, reader: ReaderId, message: ReaderMessage) -> list[OwnerEffect]:
        """A message of a reader's stream."""
        match message:
            case Watch(request_id):
                return self.watch(request_id, reader)
            case Renew(lease_id):
                return self.renew(reader, lease_id)
            case Complete(lease_id, epoch):
                return self.complete(reader, lease_id, epoch)
            case GiveUp(request_id, reason):
                return self.give_up(reader, request_id, reason)

    def watch(self, request_id: RequestId, reader: ReaderId) -> list[OwnerEffect]:
        """A reader asks for a request; repeated by the same reader it gets every chunk again."""
        effects = self.tick()
        owned = self._requests.get(request_id)
        if owned is None:
            if self.num_watches >= self._limits.max_watches:
                busy = f"{self.num_watches} requests are watched already, limit"
                return [*effects, Send(reader, Refused(request_id, busy))]
            self._add(request_id, OwnedState.WATCHED).reader = reader
            return effects
        if owned.state is OwnedState.ENDED:
            owned.is_told = True
            self._forget_if_over(owned)
            return [*effects, Send(reader, Refused(request_id, owned.reason))]
        if owned.reader not in (None, reader):
            taken = "another reader has this request"
            return [*effects, Send(reader, Refused(request_id, taken))]
        owned.reader = reader
        if owned.lease_id is not None:
            self._leases.renew(owned.lease_id)
            effects.append(self._chunk_message(owned, 0))
        return effects

    def renew(self, reader: ReaderId, lease_id: LeaseId) -> list[OwnerEffect]:
        """A lease that is over stays over; the reader learns it when it completes."""
        effects = self.tick()
        if self._owned_by(reader, lease_id) is not None:
            self._leases.renew(lease_id)
        return effects

    def complete(self, reader: ReaderId, lease_id: LeaseId, epoch: Epoch) -> list[OwnerEffect]:
        """The reader has read everything; the answer says whether it may trust it."""
        effects = self.tick()
        owned = self._owned_by(reader, lease_id)
        is_live = self._leases.get(lease_id) is not None
        may_ask = not is_live or (owned is not None and owned.state is OwnedState.FILLED)
        valid = may_ask and self._leases.complete(lease_id, epoch)
        effects.append(Send(reader, Completed(lease_id, valid)))
        if valid and owned is not None:
            del self._requests[owned.request_id]
            effects.append(ReleaseLease(owned.request_id, "completed"))
        return effects

    def give_up(self, reader: ReaderId, request_id: RequestId, reason: str) -> list[OwnerEffect]:
        """The reader will not read this request; its blocks go back now."""
        effects = self.tick()
        owned = self._requests.get(request_id)
        if owned is None or owned.reader not in (None, reader):
            return effects
        return effects + self._end(owned, f"reader gave up: {reason}", is_told=True)

    def reader_gone(self, reader: ReaderId) -> list[OwnerEffect]:
        """The stream broke. Leases stay until they expire; the reader may come back and watch."""
        effects = self.tick()
        for owned in [o for o in self._requests.values() if o.reader == reader]:
            owned.reader = None
            if owned.state is OwnedState.WATCHED:
                del self._requests[owned.request_id]
        return effects

    def request_failed(self, request_id: RequestId, reason: str) -> list[OwnerEffect]:
        """The engine ended the request (error or cancel), or nobody wants its KV any more.

        Unknown requests are ignored: a reader that asks later waits for its own router's cancel.
        """
        effects = self.tick()
        owned = self._requests.get(request_id)
        if owned is None:
            return effects
        owned.is_computed = True
        return effects + self._refuse(owned, reason)

    def tick(self) -> list[OwnerEffect]:
        """Let time pass: expire leases, refuse old watches, forget old ended requests."""
        effects: list[OwnerEffect] = []
        for lease in self._leases.expire():
            effects += self._lease_expired(lease)
        now_s = self._clock.now()
        for owned in self._in_state(OwnedState.WATCHED):
            if now_s - owned.since_s >= self._limits.watch_s:
                late = f"nothing was computed within {self._limits.watch_s:g} s of the watch"
                effects += self._refuse(owned, late)
        ended = self._in_state(OwnedState.ENDED)
        num_over = len(ended) - self._limits.max_ended
        for position, owned in enumerate(ended):
            if position < num_over or now_s - owned.since_s >= self._limits.ended_s:
                del self._requests[owned.request_id]
        return effects

    def check_integrity(self) -> None:
        """Raises AssertionError when leases and requests disagree."""
        self._leases.check_integrity()
        leased = 0
        for owned in self._requests.values():
            if owned.state in (OwnedState.LEASED, OwnedState.FILLED):
                assert owned.lease_id is not None
                lease = self._leases.get(owned.lease_id)
                assert lease is not None and lease.request_id == owned.request_id
                assert list(lease.block_ids) == owned.block_ids
                leased += 1
            else:
                assert owned.lease_id is None and not owned.block_ids
            if owned.state is OwnedState.WATCHED:
                assert owned.reader is not None
            if owned.state is OwnedState.ENDED:
                assert owned.reader is None
        assert leased == len(self._leases), "a lease without a request"
        assert self.num_watches <= self._limits.max_watches

    def _announce(
        self,
        owned: _Owned,
        block_ids: Sequence[BlockId],
        is_last: bool,
        first_token: TokenDelta | None,
    ) -> list[OwnerEffect]:
        first = len(owned.block_ids)
        if owned.lease_id is None:
            owned.lease_id = self._leases.grant(owned.request_id, block_ids).lease_id
        else:
            self._leases.extend(owned.lease_id, block_ids)
        owned.block_ids += block_ids
        owned.state = OwnedState.FILLED if is_last else OwnedState.LEASED
        owned.is_computed = is_last
        owned.first_token = first_token
        return [self._chunk_message(owned, first)] if owned.reader is not None else []

    def _chunk_message(self, owned: _Owned, first: int) -> Send:
        assert owned.reader is not None and owned.lease_id is not None
        return Send(
            owned.reader,
            ChunkReady(
                request_id=owned.request_id,
                lease_id=owned.lease_id,
                epoch=self._epoch,
                lease_s=self._leases.lease_s,
                first_block_index=first,
                block_ids=tuple(owned.block_ids[first:]),
                is_last=owned.state is OwnedState.FILLED,
                first_token=owned.first_token,
            ),
        )

    def _lease_expired(self, lease: Lease) -> list[OwnerEffect]:
        owned = self._requests[lease.request_id]
        return self._refuse(owned, f"lease expired after {self._leases.lease_s:g} s unrenewed")

    def _refuse(self, owned: _Owned, reason: str) -> list[OwnerEffect]:
        """End the request and say so to its reader."""
        reader = owned.reader
        effects = self._end(owned, reason, is_told=reader is not None)
        if reader is not None:
            effects.append(Send(reader, Refused(owned.request_id, reason)))
        return effects

    def _end(self, owned: _Owned, reason: str, *, is_told: bool) -> list[OwnerEffect]:
        effects: list[OwnerEffect] = []
        if owned.lease_id is not None:
            self._leases.revoke(owned.lease_id)
            effects.append(ReleaseLease(owned.request_id, reason))
        if owned.state is not OwnedState.ENDED:
            # Inserted anew: the order of ended requests is the order of their ending.
            del self._requests[owned.request_id]
            ended = self._add(owned.request_id, OwnedState.ENDED)
            ended.reason, ended.is_computed = reason, owned.is_computed
            owned = ended
        owned.is_told |= is_told
        self._forget_if_over(owned)
        return effects

    def _forget_if_over(self, owned: _Owned) -> None:
        """Nothing is left to say about it, and the same id may be submitted again."""
        if owned.is_computed and owned.is_told:
            del self._requests[owned.request_id]

    def _add(self, request_id: RequestId, state: OwnedState) -> _Owned:
        owned = _Owned(request_id, state, self._clock.now())
        self._requests[request_id] = owned
        return owned

    def _owned_by(self, reader: ReaderId, lease_id: LeaseId) -> _Owned | None:
        lease = self._leases.get(lease_id)
        owned = self._requests.get(lease.request_id) if lease is not None else None
        return owned if owned is not None and owned.reader in (None, reader) else None

    def _in_state(self, state: OwnedState) -> list[_Owned]:
        return [o for o in self._requests.values() if o.state is state]
