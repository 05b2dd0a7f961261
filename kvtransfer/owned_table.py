"""The requests an owner keeps, each with its lease: what every transition does to both.

Not known here: which event asks for which transition; that is `owner`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from baton.core.block import BlockId
from baton.core.clock import Clock
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch
from kvtransfer.lease import LeaseTable
from kvtransfer.messages import ChunkReady, LeaseId, Refused
from kvtransfer.owned import (
    Owned,
    OwnedKind,
    OwnedState,
    OwnerEffect,
    OwnerLimits,
    ReaderId,
    ReleaseLease,
    ResumeRequest,
    Send,
)

Effects = list[OwnerEffect]


class OwnedTable:
    """Requests by the engine's name for them. Methods that change one return what to apply."""

    def __init__(self, *, epoch: Epoch, clock: Clock, limits: OwnerLimits) -> None:
        self._epoch = epoch
        self._clock = clock
        self._limits = limits
        self._live: dict[RequestId, Owned] = {}
        self._ended: dict[RequestId, Owned] = {}
        """The first to end first."""
        self._check_at_s = math.inf
        """Before this nothing can be due."""
        self.leases = LeaseTable(clock=clock, epoch=epoch, lease_s=limits.lease_s)
        self.num_orphaned = 0
        """Leases that ended because their reader's stream did not come back."""

    def __len__(self) -> int:
        """Live ones."""
        return len(self._live)

    def get(self, request_id: RequestId) -> Owned | None:
        """Live or ended."""
        return self._live.get(request_id) or self._ended.get(request_id)

    def live_of(self, reader: ReaderId) -> list[Owned]:
        return [owned for owned in self._live.values() if owned.reader == reader]

    def num_live(self, kind: OwnedKind, state: OwnedState | None = None) -> int:
        return sum(o.kind is kind and state in (None, o.state) for o in self._live.values())

    def num_over(self, limit: int, kind: OwnedKind, state: OwnedState | None = None) -> int:
        """How many there are when that is the limit or more, else 0."""
        if len(self._live) < limit:
            return 0
        count = self.num_live(kind, state)
        return count if count >= limit else 0

    def owned_by(self, reader: ReaderId, lease_id: LeaseId) -> Owned | None:
        """Whose live lease this is, when the reader may have it."""
        lease = self.leases.get(lease_id)
        owned = self._live.get(lease.request_id) if lease is not None else None
        return owned if owned is not None and owned.is_open_to(reader) else None

    def add(
        self,
        request_id: RequestId,
        kind: OwnedKind,
        state: OwnedState,
        *,
        name: RequestId | None = None,
    ) -> Owned:
        owned = Owned(request_id, kind, state, self._clock.now(), name or request_id)
        self._live[request_id] = owned
        self._check_by(owned.deadline(self._limits)[0])
        return owned

    def remove(self, owned: Owned) -> None:
        """Forget it, live or ended; its lease must be over."""
        self._live.pop(owned.request_id, None)
        self._ended.pop(owned.request_id, None)

    def ask_again(self, owned: Owned, kind: OwnedKind, reader: ReaderId) -> Effects:
        """The question of a reader that may have asked it before its stream broke."""
        if owned.state is OwnedState.ENDED:
            owned.is_told = True
            self.forget_if_over(owned)
            return [Send(reader, Refused(owned.name, owned.reason))]
        if not owned.is_open_to(reader):
            return [Send(reader, Refused(owned.name, "another reader has this request"))]
        if owned.kind is not kind:
            other = f"this request is under way as {owned.kind.value}, not as {kind.value}"
            return [Send(reader, Refused(owned.name, other))]
        owned.reader, owned.orphaned_at_s = reader, None
        if owned.lease_id is None:
            return []
        if owned.lease_reader in (None, reader):
            self.leases.renew(owned.lease_id)
        else:
            # What this reader completes must not vouch for what the one before may still read.
            self.leases.revoke(owned.lease_id)
            owned.lease_id = self.leases.grant(owned.request_id, owned.block_ids).lease_id
        owned.lease_reader = reader
        return [self._chunk_message(owned, reader, 0)]

    def orphan(self, owned: Owned) -> None:
        """The stream of its reader is gone; `ask_again` says that there is another."""
        owned.reader, owned.orphaned_at_s = None, self._clock.now()
        # Another reader may come, which has read nothing.
        owned.read_fill_id = 0
        self._check_by(owned.deadline(self._limits)[0])

    def announce(
        self,
        owned: Owned,
        block_ids: Sequence[BlockId],
        is_last: bool,
        first_token: TokenDelta | None,
        fill_id: int = 0,
    ) -> Effects:
        """Put blocks under the request's lease and tell its reader, if there is one."""
        first = len(owned.block_ids)
        if owned.lease_id is None:
            lease = self.leases.grant(owned.request_id, block_ids)
        else:
            lease = self.leases.extend(owned.lease_id, block_ids)
        owned.lease_id = lease.lease_id
        owned.block_ids += block_ids
        owned.state = OwnedState.FILLED if is_last else OwnedState.LEASED
        owned.first_token, owned.fill_id = first_token, fill_id
        if is_last:
            owned.filled_at_s = self._clock.now()
            owned.engine_is_done = owned.kind is not OwnedKind.TAKEOVER
        self._check_by(min(lease.expires_at_s, owned.deadline(self._limits)[0]))
        if owned.reader is None:
            return []
        owned.lease_reader = owned.reader
        return [self._chunk_message(owned, owned.reader, first)]

    def refuse(self, owned: Owned, reason: str) -> Effects:
        """End a live request and say so to its reader."""
        reader = owned.reader
        effects = self.end(owned, reason, is_told=reader is not None)
        if reader is not None:
            effects.append(Send(reader, Refused(owned.name, reason)))
        return effects

    def end(self, owned: Owned, reason: str, *, is_told: bool) -> Effects:
        """Whatever the state: take the lease back, and the handover, and remember why."""
        owned.is_told |= is_told
        if owned.state is OwnedState.ENDED:
            self.forget_if_over(owned)
            return []
        effects: Effects = []
        must_resume = owned.kind is OwnedKind.TAKEOVER and not owned.engine_is_done
        if owned.lease_id is not None:
            self.leases.revoke(owned.lease_id)
        if owned.lease_id is not None or must_resume:
            # A handover may have leased blocks of which nothing has been heard here.
            effects.append(ReleaseLease(owned.request_id, reason))
        if must_resume:
            effects.append(ResumeRequest(owned.request_id, reason))
        owned.state, owned.reason, owned.since_s = OwnedState.ENDED, reason, self._clock.now()
        owned.reader = owned.lease_id = owned.first_token = owned.orphaned_at_s = None
        owned.block_ids = []
        del self._live[owned.request_id]
        self._ended[owned.request_id] = owned
        self._check_by(owned.deadline(self._limits)[0])
        self.forget_if_over(owned)
        if len(self._ended) > self._limits.max_ended:
            del self._ended[next(iter(self._ended))]
        return effects

    def engine_is_over(self, owned: Owned, reason: str) -> Effects:
        """Nothing of the request is left in the engine but its leases."""
        if owned.state is not OwnedState.ENDED:
            owned.engine_is_done = True
            return self.refuse(owned, reason)
        if not owned.is_resuming:
            owned.engine_is_done = True
            self.forget_if_over(owned)
        return []

    def engine_has_resumed(self, owned: Owned) -> None:
        """The answer to ResumeRequest."""
        owned.engine_is_done = True
        self._check_by(owned.deadline(self._limits)[0])
        self.forget_if_over(owned)

    def forget_if_over(self, owned: Owned) -> None:
        """Nothing is left to say about it, and the same id may be submitted again."""
        if owned.state is OwnedState.ENDED and owned.engine_is_done and owned.is_told:
            self._ended.pop(owned.request_id, None)

    def tick(self) -> Effects:
        """Let time pass: expire leases, end what takes too long, forget old ended requests."""
        now_s = self._clock.now()
        if now_s < self._check_at_s:
            return []
        effects: Effects = []
        for lease in self.leases.expire():
            expired = f"lease expired after {self.leases.lease_s:g} s unrenewed"
            effects += self.refuse(self._live[lease.request_id], expired)
        for owned in [*self._live.values(), *self._ended.values()]:
            deadline_s, reason = owned.deadline(self._limits)
            if deadline_s > now_s:
                continue
            if owned.state is OwnedState.ENDED:
                self.remove(owned)
            else:
                self.num_orphaned += owned.orphaned_at_s is not None and owned.is_leased
                effects += self.refuse(owned, reason)
        self._check_at_s = min(
            self.leases.next_expiry_s,
            min((o.deadline(self._limits)[0] for o in self._live.values()), default=math.inf),
            min((o.deadline(self._limits)[0] for o in self._ended.values()), default=math.inf),
        )
        return effects

    def check_integrity(self) -> None:
        """Raises AssertionError when leases and requests disagree, or a limit is passed."""
        limits = self._limits
        self.leases.check_integrity()
        assert not self._live.keys() & self._ended.keys(), "live and ended at once"
        leased = 0
        for request_id, owned in (*self._live.items(), *self._ended.items()):
            assert owned.request_id == request_id
            assert (owned.state is OwnedState.ENDED) == (request_id in self._ended)
            assert owned.deadline(limits)[0] >= self._check_at_s, "its end would be missed"
            owned.check_integrity()
            if owned.lease_id is not None:
                lease = self.leases.get(owned.lease_id)
                assert lease is not None and lease.request_id == request_id
                assert list(lease.block_ids) == owned.block_ids
                leased += 1
        assert leased == len(self.leases), "a lease without a request"
        assert self.leases.next_expiry_s >= self._check_at_s, "its expiry would be missed"
        assert self.num_live(OwnedKind.PROMPT, OwnedState.WATCHED) <= limits.max_watches
        assert self.num_live(OwnedKind.PREFIX) <= limits.max_prefix_fetches
        assert self.num_live(OwnedKind.TAKEOVER) <= limits.max_takeovers
        assert len(self._ended) <= limits.max_ended

    def _check_by(self, at_s: float) -> None:
        self._check_at_s = min(self._check_at_s, at_s)

    def _chunk_message(self, owned: Owned, reader: ReaderId, first: int) -> Send:
        assert owned.lease_id is not None
        return Send(
            reader,
            ChunkReady(
                request_id=owned.name,
                lease_id=owned.lease_id,
                epoch=self._epoch,
                lease_s=self.leases.lease_s,
                first_block_index=first,
                block_ids=tuple(owned.block_ids[first:]),
                is_last=owned.state is OwnedState.FILLED,
                fill_id=owned.fill_id,
                first_token=owned.first_token,
            ),
        )
