"""The reader's side of every movement of KV: its life cycle, values and seams.

Three kinds of fetches, one life cycle (the transitions are in `fetch_machine`):

    kind       asks with     blocks to read into      what comes
    PROMPT     Watch         for the whole prompt     all of it, chunk by chunk, and the first token
    PREFIX     FetchPrefix   for the hashes asked     as many leading blocks as the owner caches
    TAKEOVER   Takeover      with slack at the end    finished blocks; after Freeze the rest, and
                                                      the tokens the reader does not know

 1. start      the question goes to the owner; what it announces is remembered and its lease kept
               alive, however long our own blocks take to come                    -> WATCHING
 2. reserved   the blocks to read into are here                                   -> WAITING
 3. chunk      its blocks, less those held already, queue up; none in flight: read them all at
               once                                                               -> READING
    layers     of a prompt's last blocks, while they are computed: read when nothing else is
               waiting. They count once the last chunk has confirmed them         -> READING
 4. read done  more queued: the next read; not all announced: wait                -> WAITING
               a takeover that has read all there is: Freeze, once per stream     -> WAITING
               everything read: Complete(lease, epoch)                            -> COMPLETING
 5. completed  valid: the blocks may become active; not valid: LeaseLost          -> ENDED
 x. any state  cancel, refusal, deadline, dead owner, lost lease: Fail with the blocks a read may
               still write to; GiveUp to the owner, which resumes what was to be taken over -> ENDED

One read is in flight at most, and chunks that finish meanwhile become one larger read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from baton.core.block import BlockHash, BlockId
from baton.core.errors import BatonError
from baton.core.lifecycle import TransferStats
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.messages import ReaderMessage
from kvtransfer.transport import UnitsPerBlock

WHOLE_BLOCKS = UnitsPerBlock(1, 1)
"""Of pools with equal block sizes."""


class FetchKind(Enum):
    PROMPT = "prompt"
    PREFIX = "prefix"
    TAKEOVER = "takeover"


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
    kind: FetchKind = FetchKind.PROMPT
    num_known_tokens: int = 0
    """Only TAKEOVER: output tokens known here."""
    block_hashes: tuple[BlockHash, ...] = ()
    """Only PREFIX."""
    units_per_block: UnitsPerBlock = WHOLE_BLOCKS
    num_layers: int = 0
    """Into which a read can be divided; 0: what LayersReady says is of no use."""


@dataclass(frozen=True, slots=True)
class TransferResult:
    """The KV is here and was valid."""

    request_id: RequestId
    first_token: TokenDelta | None
    """As the owner sent it; not looked into here. None for PREFIX."""
    stats: TransferStats
    started_at_s: float
    """When the blocks to read into were here."""
    ended_at_s: float
    kind: FetchKind = FetchKind.PROMPT
    num_blocks: int = 0
    """Leading blocks of the given ones that are valid, those that were cached included; the last
    may be partly filled. The others hold nothing and no read will write to them."""
    pause_s: float = 0.0
    """Only TAKEOVER: from Freeze until the owner vouched for all of it."""


@dataclass(frozen=True, slots=True)
class TransferFailure:
    """The KV will not come. `error` is a TransferError, or RequestCancelled."""

    request_id: RequestId
    error: BatonError
    unsettled: tuple[BlockId, ...]
    """Blocks a read may still write to; all others may be reused at once."""
    kind: FetchKind = FetchKind.PROMPT


@dataclass(frozen=True, slots=True)
class ToOwner:
    """Effect: send `message` to the owner."""

    message: ReaderMessage


@dataclass(frozen=True, slots=True)
class StartRead:
    """Effect: read the owner's units `remote[i]` into ours `local[i]`."""

    remote: tuple[BlockId, ...]
    local: tuple[BlockId, ...]
    layers: range | None = None
    """Of these units; None: all."""


@dataclass(frozen=True, slots=True)
class StopRead:
    """Effect: give up on the read in flight."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Effect, the last one: the outcome."""

    outcome: TransferResult | TransferFailure


FetchEffect = ToOwner | StartRead | StopRead | Finish


@dataclass(slots=True)
class FetchCounters:
    """What a worker has fetched since its start, for its `FabricCounters`."""

    reads: int = 0
    read_bytes: int = 0
    failed_reads: int = 0
    """Ended with an error or given up."""
    fetched_blocks: int = 0
    """Of peers' prefix caches, vouched for."""
    takeovers: int = 0
    failed_takeovers: int = 0
    takeover_pause_seconds: float = 0.0
    """Sum of `TransferResult.pause_s`."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Time limits of the reader."""

    read_timeout_s: float = 10.0
    """Of one read. A healthy read of a long prompt takes well under a second on one host."""
    link_grace_s: float = 2.0
    """How long a broken stream to the owner may take to come back."""
    tick_s: float = 0.05
    """Resolution of all deadlines here; costs nothing while nothing is fetched."""


class OwnerLink(Protocol):
    """The reader's outgoing half of the streams to the owners."""

    def send(self, peer: WorkerId, message: ReaderMessage) -> None:
        """Queue a message, in order, without blocking.

        A broken stream drops it silently; `GiveUp` it may keep for the stream that follows.
        """
        ...


class TransferSink(Protocol):
    """Who wants to know. Called on the event loop; must not block or raise."""

    def transfer_finished(self, result: TransferResult) -> None:
        """`result.num_blocks` blocks of the fetch are valid."""
        ...

    def transfer_failed(self, failure: TransferFailure) -> None:
        """`failure.unsettled` must be withheld until `blocks_settled` names them."""
        ...

    def blocks_settled(self, block_ids: list[BlockId]) -> None:
        """Withheld blocks that nothing can write to any more; each named once."""
        ...
