"""The owner's side of every movement of KV: puts blocks under leases, and takes them back.

Life cycle of one request here (the reader's side is `fetch_state`, the values are in `owned`):

 1. WATCHED  a reader asked, nothing is announced yet
               Watch        the engine will compute the prompt, or does already
               FetchPrefix  LeasePrefix went to the engine
               Takeover     StartHandover went to the engine
 2. LEASED   the engine's first blocks are under a lease; every further announcement extends it.
             A prompt comes here without a reader too: its watch gets all chunks at once
 3. FILLED   everything is announced, the reader has what is left of the lease. A takeover comes
             here by Freeze -> FreezeRequest; its sequence stands still from now on
 4. the reader completes: the lease was valid until now. The blocks go back to the engine, a
    sequence that was taken over ends there (FinishHandover), gone. A reader that has read by
    layers may have said so before 3: it is answered at 3, and completes all the same
 x. ENDED    the lease is over in any other way (given up, expired, refused, too late, failed): a
             takeover makes the engine go on (ReleaseLease, then ResumeRequest, once). Remembered
             while the engine may still announce: what comes late is given back at once

Pure state machine: events in, effects out, the clock passed in. Does no I/O, knows neither gRPC
nor the engine; the shell sends and calls the engine, in the order of the effects. A lost stream
takes a lease away at once where a client waits: a sequence that stands still resumes. The others
wait a moment for the reader to come back. Everything kept here has a time and a number limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.block import BlockHash, BlockId
from baton.core.clock import Clock
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch
from kvtransfer.messages import (
    Complete,
    Completed,
    FetchPrefix,
    Freeze,
    GiveUp,
    LayersRead,
    LayersReady,
    LeaseId,
    ReaderMessage,
    Refused,
    Renew,
    Takeover,
    Watch,
)
from kvtransfer.owned import (
    FinishHandover,
    FreezeRequest,
    LeasePrefix,
    Owned,
    OwnedKind,
    OwnedState,
    OwnerEffect,
    OwnerLimits,
    ReaderId,
    ReleaseLease,
    ResumeRequest,
    Send,
    StartHandover,
)
from kvtransfer.owned_table import OwnedTable

__all__ = [
    "COMPLETED",
    "FinishHandover",
    "FreezeRequest",
    "LeaseOwner",
    "LeasePrefix",
    "OwnerEffect",
    "OwnerLimits",
    "ReaderId",
    "ReleaseLease",
    "ResumeRequest",
    "Send",
    "StartHandover",
]

COMPLETED = "completed"
"""The reason of a ReleaseLease in good order."""

Effects = list[OwnerEffect]


class LeaseOwner:
    """All leases of one worker. Every method returns the effects to apply, in order."""

    def __init__(self, *, epoch: Epoch, clock: Clock, limits: OwnerLimits | None = None) -> None:
        self._limits = limits or OwnerLimits()
        self._epoch = epoch
        self._table = OwnedTable(epoch=epoch, clock=clock, limits=self._limits)

    @property
    def num_leases(self) -> int:
        return len(self._table.leases)

    @property
    def leased_requests(self) -> list[RequestId]:
        """As the engine calls them."""
        return self._table.leases.requests

    @property
    def num_expired_leases(self) -> int:
        """Since the start; unrenewed ones, and those whose reader lost its stream for good."""
        return self._table.leases.num_expired + self._table.num_orphaned

    @property
    def num_watches(self) -> int:
        """Readers that wait for a prompt of which nothing is computed."""
        return self._table.num_live(OwnedKind.PROMPT, OwnedState.WATCHED)

    @property
    def num_takeovers(self) -> int:
        return self._table.num_live(OwnedKind.TAKEOVER)

    @property
    def is_empty(self) -> bool:
        """No lease is live and no reader waits."""
        return not len(self._table)

    # From the engine.

    def chunk_done(
        self,
        request_id: RequestId,
        *,
        first_block_index: int,
        block_ids: Sequence[BlockId],
        is_last: bool,
        first_token: TokenDelta | None,
        fill_id: int = 0,
    ) -> Effects:
        """The engine finished blocks of a prompt or a takeover and counts a lease on each."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is not None and owned.engine_is_done and first_block_index == 0:
            # The same request was submitted again; what is left of its first life is over.
            effects += self._table.end(owned, "computed again", is_told=True)
            owned = None
        if owned is None and first_block_index == 0:
            owned = self._table.add(request_id, OwnedKind.PROMPT, OwnedState.LEASED)
        if owned is None or owned.state is OwnedState.ENDED:
            effects.append(ReleaseLease(request_id, owned.reason if owned else "unknown request"))
            if owned is not None and owned.kind is OwnedKind.PROMPT:
                owned.engine_is_done |= is_last
                self._table.forget_if_over(owned)
            return effects
        if first_block_index != len(owned.block_ids):
            gap = f"chunk starts at block {first_block_index}, expected {len(owned.block_ids)}"
            return [*effects, ReleaseLease(request_id, gap), *self._table.refuse(owned, gap)]
        effects += self._table.announce(owned, block_ids, is_last, first_token, fill_id)
        return effects + self._complete_early(owned)

    def layers_done(self, request_id: RequestId, layers: LayersReady) -> Effects:
        """The engine is half way through the last blocks of a prompt.

        Nothing is kept of it: a reader that misses it reads all layers at the end.
        """
        owned = self._table.get(request_id)
        if owned is None or owned.reader is None or owned.kind is not OwnedKind.PROMPT:
            return []
        if owned.state is OwnedState.FILLED or layers.first_block_index != len(owned.block_ids):
            return []
        return [Send(owned.reader, layers)]

    def prefix_leased(
        self, reader: ReaderId, request_id: RequestId, block_ids: Sequence[BlockId]
    ) -> Effects:
        """The answer to LeasePrefix; no blocks when the engine caches none of them."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is None or owned.state is not OwnedState.WATCHED or owned.claimant != reader:
            effects.append(ReleaseLease(request_id, "nobody waits for this prefix"))
            if owned is not None:
                owned.engine_is_done = True
                self._table.forget_if_over(owned)
            return effects
        owned.engine_is_done = True
        if not block_ids:
            return effects + self._table.refuse(owned, "none of these blocks is cached here")
        return effects + self._table.announce(owned, block_ids, True, None)

    def handover_failed(self, request_id: RequestId, reason: str) -> Effects:
        """The engine refused StartHandover or FreezeRequest; the sequence stays as it is."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is None or owned.kind is not OwnedKind.TAKEOVER:
            return effects
        if owned.state is OwnedState.ENDED:
            return effects
        # Before the first chunk there is no handover to take back.
        owned.engine_is_done |= owned.state is OwnedState.WATCHED
        return effects + self._table.refuse(owned, reason)

    def handover_ended(self, request_id: RequestId) -> Effects:
        """The engine has done as ResumeRequest said: no chunk of that handover follows."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is not None and owned.is_resuming:
            self._table.engine_has_resumed(owned)
        return effects

    def request_ended(self, request_id: RequestId, reason: str) -> Effects:
        """A sequence is over (last token, cancel, error), so nobody can take it over any more.

        Only takeovers care; leases of its prompt live on, so this may be said of every request.
        """
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is None or owned.kind is not OwnedKind.TAKEOVER:
            return effects
        return effects + self._table.engine_is_over(owned, reason)

    def request_failed(self, request_id: RequestId, reason: str) -> Effects:
        """The engine ended the request (error or cancel), or nobody wants its KV any more.

        Unknown requests are ignored: a reader that asks later waits for its own router's cancel.
        """
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is None:
            return effects
        if owned.kind is OwnedKind.TAKEOVER and owned.state is not OwnedState.ENDED:
            # Its sequence may well be there, and must not stand still for nobody.
            return effects + self._table.refuse(owned, reason)
        return effects + self._table.engine_is_over(owned, reason)

    # From the readers.

    def receive(self, reader: ReaderId, message: ReaderMessage) -> Effects:
        """A message of a reader's stream."""
        match message:
            case Watch(request_id):
                return self.watch(request_id, reader)
            case FetchPrefix(request_id, block_hashes):
                return self.fetch_prefix(request_id, reader, block_hashes)
            case Takeover(request_id, num_known_tokens):
                return self.take_over(request_id, reader, num_known_tokens)
            case Freeze(request_id):
                return self.freeze(request_id, reader)
            case Renew(lease_id):
                return self.renew(reader, lease_id)
            case Complete(lease_id, epoch):
                return self.complete(reader, lease_id, epoch)
            case LayersRead(request_id, fill_id):
                return self.layers_read(reader, request_id, fill_id)
            case GiveUp(request_id, reason):
                return self.give_up(reader, request_id, reason)

    def watch(self, request_id: RequestId, reader: ReaderId) -> Effects:
        """A reader asks for a prompt; repeated by the same reader it gets every chunk again."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is None:
            num_watches = self._table.num_over(
                self._limits.max_watches, OwnedKind.PROMPT, OwnedState.WATCHED
            )
            if num_watches:
                busy = f"{num_watches} requests are watched already, limit"
                return [*effects, Send(reader, Refused(request_id, busy))]
            self._table.add(request_id, OwnedKind.PROMPT, OwnedState.WATCHED).reader = reader
            return effects
        return effects + self._table.ask_again(owned, OwnedKind.PROMPT, reader)

    def fetch_prefix(
        self, request_id: RequestId, reader: ReaderId, block_hashes: tuple[BlockHash, ...]
    ) -> Effects:
        """A reader asks for cached blocks; `request_id` is its own name for the question."""
        effects = self.tick()
        lease_name = _prefix_id(reader, request_id)
        owned = self._table.get(lease_name)
        if owned is not None:
            return effects + self._table.ask_again(owned, OwnedKind.PREFIX, reader)
        if not block_hashes:
            return [*effects, Send(reader, Refused(request_id, "no block hashes were sent"))]
        num_fetches = self._table.num_over(self._limits.max_prefix_fetches, OwnedKind.PREFIX)
        if num_fetches:
            busy = f"{num_fetches} prefixes are being fetched already, limit"
            return [*effects, Send(reader, Refused(request_id, busy))]
        owned = self._table.add(lease_name, OwnedKind.PREFIX, OwnedState.WATCHED, name=request_id)
        owned.reader = owned.claimant = reader
        return [*effects, LeasePrefix(reader, lease_name, block_hashes)]

    def take_over(self, request_id: RequestId, reader: ReaderId, num_known_tokens: int) -> Effects:
        """A reader is to go on with a request; repeated by it, it gets every chunk again."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is not None and _may_begin_again(owned, reader):
            self._table.remove(owned)
            owned = None
        if owned is not None:
            known = owned.num_known_tokens
            if owned.claimant == reader and owned.is_open_to(reader) and known != num_known_tokens:
                changed = f"takeover from token {num_known_tokens}, it began with {known}"
                return effects + self._table.refuse(owned, changed)
            return effects + self._table.ask_again(owned, OwnedKind.TAKEOVER, reader)
        num_takeovers = self._table.num_over(self._limits.max_takeovers, OwnedKind.TAKEOVER)
        if num_takeovers:
            busy = f"{num_takeovers} requests are being taken over already, limit"
            return [*effects, Send(reader, Refused(request_id, busy))]
        owned = self._table.add(request_id, OwnedKind.TAKEOVER, OwnedState.WATCHED)
        owned.reader = owned.claimant = reader
        owned.num_known_tokens = num_known_tokens
        return [*effects, StartHandover(request_id, num_known_tokens)]

    def freeze(self, request_id: RequestId, reader: ReaderId) -> Effects:
        """The reader has all that is announced; the engine is told once."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is None or owned.kind is not OwnedKind.TAKEOVER or not owned.is_open_to(reader):
            unknown = "this reader takes no such request over"
            return [*effects, Send(reader, Refused(request_id, unknown))]
        if owned.state is OwnedState.ENDED:
            return effects + self._table.ask_again(owned, OwnedKind.TAKEOVER, reader)
        if owned.is_freezing:
            return effects
        owned.is_freezing = True
        return [*effects, FreezeRequest(request_id)]

    def renew(self, reader: ReaderId, lease_id: LeaseId) -> Effects:
        """A lease that is over stays over; the reader learns it when it completes."""
        effects = self.tick()
        if self._table.owned_by(reader, lease_id) is not None:
            self._table.leases.renew(lease_id)
        return effects

    def complete(self, reader: ReaderId, lease_id: LeaseId, epoch: Epoch) -> Effects:
        """The reader has read everything; the answer says whether it may trust it."""
        effects = self.tick()
        owned = self._table.owned_by(reader, lease_id)
        is_live = self._table.leases.get(lease_id) is not None
        may_ask = not is_live or (owned is not None and owned.state is OwnedState.FILLED)
        valid = may_ask and self._table.leases.complete(lease_id, epoch)
        effects.append(Send(reader, Completed(lease_id, valid)))
        if valid and owned is not None:
            self._table.remove(owned)
            effects.append(ReleaseLease(owned.request_id, COMPLETED))
            if owned.kind is OwnedKind.TAKEOVER:
                effects.append(FinishHandover(owned.request_id))
        return effects

    def layers_read(self, reader: ReaderId, request_id: RequestId, fill_id: int) -> Effects:
        """The reader has everything, perhaps before the engine has."""
        effects = self.tick()
        owned = self._table.get(request_id)
        if owned is None or owned.kind is not OwnedKind.PROMPT or owned.reader != reader:
            return effects
        owned.read_fill_id = fill_id
        return effects + self._complete_early(owned)

    def _complete_early(self, owned: Owned) -> Effects:
        """Answer the Complete that is under way, or will be, when nothing is left to read.

        The lease lives until that comes: should the answer be lost, or somebody else ask, the
        blocks are still what was announced.
        """
        is_read = owned.fill_id and owned.fill_id == owned.read_fill_id
        if owned.state is not OwnedState.FILLED or not is_read or owned.reader is None:
            return []
        assert owned.lease_id is not None
        owned.read_fill_id = 0
        return [Send(owned.reader, Completed(owned.lease_id, True))]

    def give_up(self, reader: ReaderId, request_id: RequestId, reason: str) -> Effects:
        """The reader will not read this request; its blocks go back now."""
        effects = self.tick()
        owned = self._table.get(_prefix_id(reader, request_id)) or self._table.get(request_id)
        if owned is None or not owned.is_open_to(reader):
            return effects
        return effects + self._table.end(owned, f"reader gave up: {reason}", is_told=True)

    def reader_gone(self, reader: ReaderId) -> Effects:
        """The stream broke, or another has taken its place.

        The reader may come back within `orphan_s` and ask. A sequence that was told to freeze does
        not wait for it: should all have been read, `complete` still says no.
        """
        effects = self.tick()
        for owned in self._table.live_of(reader):
            if owned.is_freezing:
                broke = "the reader's stream broke while the request stood still"
                effects += self._table.end(owned, broke, is_told=False)
            elif owned.kind is OwnedKind.PROMPT and owned.state is OwnedState.WATCHED:
                self._table.remove(owned)
            else:
                self._table.orphan(owned)
        return effects

    # Time.

    def tick(self) -> Effects:
        """Let time pass: expire leases, end what takes too long, forget old ended requests."""
        return self._table.tick()

    def check_integrity(self) -> None:
        """Raises AssertionError when leases and requests disagree, or a limit is passed."""
        self._table.check_integrity()


def _prefix_id(reader: ReaderId, request_id: RequestId) -> RequestId:
    """A reader chooses the name of a fetch; it must meet no other reader's, and no request."""
    return RequestId(f"prefix of {reader}: {request_id}")


def _may_begin_again(owned: Owned, reader: ReaderId) -> bool:
    """A reader that was away when its takeover ended is told so first."""
    is_its_own = owned.kind is OwnedKind.TAKEOVER and owned.claimant == reader
    return owned.state is OwnedState.ENDED and not owned.is_resuming and not is_its_own
