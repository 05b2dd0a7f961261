"""What an owner of KV keeps per request, and what it asks of its shell: values only.

The transitions are in `owner`. Three kinds of requests end in one lease each:

    kind       asked for by   announced by the engine as            `valid` makes the engine
    PROMPT     Watch          chunks of a prompt it computes        let go of the blocks
    PREFIX     FetchPrefix    one list of cached blocks             let go of the blocks
    TAKEOVER   Takeover       finished blocks, the rest on Freeze   end the sequence as handed on
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from baton.core.block import BlockHash, BlockId
from baton.core.request import RequestId, TokenDelta
from kvtransfer.messages import LeaseId, OwnerMessage

ReaderId = NewType("ReaderId", str)
"""One process of one reader, named by the shell; a reconnected stream uses the same name."""


@dataclass(frozen=True, slots=True)
class OwnerLimits:
    """How long and how much an owner keeps for readers."""

    lease_s: float = 30.0
    """Term of a lease. Renewed by the reader at a third of it, so two lost renewals are fine."""
    orphan_s: float = 5.0
    """How long what a reader has asked for outlives its stream. More than the reader itself waits
    for the stream to come back; what a dead one leaves behind is free again after this."""
    held_s: float = 900.0
    """A lease ends after this, however often it is renewed: no reader pins blocks for ever."""
    watch_s: float = 120.0
    """A watch for a request of which nothing is computed is refused after this; it bounds
    the time a prompt may queue here, while its reader may hold blocks."""
    takeover_s: float = 120.0
    """From Takeover to Complete. The sequence generates on meanwhile, its blocks are leased."""
    frozen_s: float = 3.0
    """From the last chunk of a takeover to Complete: how long a client can be left without tokens
    by a reader that died or dawdles."""
    ended_s: float = 120.0
    """How long an ended request's late chunks are still recognised."""
    max_watches: int = 4096
    max_prefix_fetches: int = 1024
    max_takeovers: int = 256
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


@dataclass(frozen=True, slots=True)
class LeasePrefix:
    """Effect: lease the longest leading part of `block_hashes` that the engine caches now.

    Answered by exactly one `prefix_leased` with the same `reader` and `request_id`.
    """

    reader: ReaderId
    request_id: RequestId
    """The lease's name in the engine, unlike that of any request."""
    block_hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class StartHandover:
    """Effect: the engine leases and announces finished blocks of a sequence it generates.

    Should it refuse, `handover_failed` says so.
    """

    request_id: RequestId
    num_known_tokens: int


@dataclass(frozen=True, slots=True)
class FreezeRequest:
    """Effect: the engine stops the sequence and announces the rest of it.

    Should it refuse, `handover_failed` says so.
    """

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """Effect: the engine generates on as if there had been no handover, frozen or not.

    Comes after the ReleaseLease of the same request. Answered by one `handover_ended`.
    """

    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class FinishHandover:
    """Effect: the reader has the sequence; it ends here as handed on."""

    request_id: RequestId


OwnerEffect = (
    Send
    | ReleaseLease
    | LeasePrefix
    | StartHandover
    | FreezeRequest
    | ResumeRequest
    | FinishHandover
)


class OwnedKind(Enum):
    PROMPT = "prompt"
    PREFIX = "prefix"
    TAKEOVER = "takeover"


class OwnedState(Enum):
    WATCHED = "watched"
    LEASED = "leased"
    FILLED = "filled"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Owned:
    """One request that readers or the engine have named."""

    request_id: RequestId
    """As the engine calls it."""
    kind: OwnedKind
    state: OwnedState
    since_s: float
    """Of its first state; when ENDED, of its end."""
    name: RequestId
    """As its reader calls it."""
    reader: ReaderId | None = None
    """Whose stream gets the messages; None while there is none."""
    orphaned_at_s: float | None = None
    """When its reader's stream broke; None while there is one, or nobody has asked."""
    claimant: ReaderId | None = None
    """The only reader that may have it, stream or not; None when the first that asks may."""
    lease_id: LeaseId | None = None
    lease_reader: ReaderId | None = None
    """Who was told `lease_id`."""
    block_ids: list[BlockId] = field(default_factory=list)
    first_token: TokenDelta | None = None
    fill_id: int = 0
    """Only PROMPT: what filled its last blocks, 0 for nothing that was told by layers."""
    read_fill_id: int = 0
    """Only PROMPT: the reader has all layers of this, and all that was announced before."""
    filled_at_s: float = 0.0
    reason: str = ""
    num_known_tokens: int = 0
    is_freezing: bool = False
    """Only TAKEOVER: the engine was told to freeze the sequence."""
    engine_is_done: bool = False
    """The engine announces nothing more for it and has no handover of it to take back."""
    is_told: bool = False
    """Only ENDED: the reader knows. When the engine is done too, nothing is left to remember."""

    @property
    def is_leased(self) -> bool:
        return self.state in (OwnedState.LEASED, OwnedState.FILLED)

    @property
    def is_resuming(self) -> bool:
        """The engine was told to resume and has not answered: chunks may still be under way, which
        would pass for those of another takeover."""
        is_ended = self.state is OwnedState.ENDED
        return is_ended and self.kind is OwnedKind.TAKEOVER and not self.engine_is_done

    def is_open_to(self, reader: ReaderId) -> bool:
        return self.claimant in (None, reader) and self.reader in (None, reader)

    def deadline(self, limits: OwnerLimits) -> tuple[float, str]:
        """When this must end at the latest, its lease apart, and why."""
        asked = self._deadline(limits)
        if self.orphaned_at_s is None:
            return asked
        gone = f"its reader had no stream for {limits.orphan_s:g} s"
        return min(asked, (self.orphaned_at_s + limits.orphan_s, gone))

    def _deadline(self, limits: OwnerLimits) -> tuple[float, str]:
        if self.is_resuming:
            # Our own engine answers, whatever has become of the request.
            return math.inf, ""
        if self.state is OwnedState.ENDED:
            return self.since_s + limits.ended_s, ""
        if self.kind is OwnedKind.TAKEOVER and self.state is OwnedState.FILLED:
            still = f"the request stood still for {limits.frozen_s:g} s, limit"
            return self.filled_at_s + limits.frozen_s, still
        if self.kind is OwnedKind.TAKEOVER:
            late = f"the takeover was not completed within {limits.takeover_s:g} s"
            return self.since_s + limits.takeover_s, late
        if self.state is OwnedState.WATCHED:
            silent = f"nothing was announced within {limits.watch_s:g} s of the question"
            return self.since_s + limits.watch_s, silent
        long = f"the blocks were held for {limits.held_s:g} s, limit"
        return self.since_s + limits.held_s, long

    def check_integrity(self) -> None:
        """Raises AssertionError when the fields contradict the state."""
        assert self.is_leased == (self.lease_id is not None)
        assert self.is_leased or not self.block_ids
        if self.state is OwnedState.WATCHED and self.kind is OwnedKind.PROMPT:
            assert self.reader is not None
        assert self.orphaned_at_s is None or self.reader is None
        if self.state is OwnedState.ENDED:
            assert self.reader is None and self.orphaned_at_s is None
            assert not (self.engine_is_done and self.is_told), "nothing is left to remember"
        if self.kind is OwnedKind.PROMPT:
            assert self.name == self.request_id and self.claimant is None
        else:
            assert self.claimant is not None and self.reader in (None, self.claimant)
        assert not self.is_freezing or self.kind is OwnedKind.TAKEOVER
