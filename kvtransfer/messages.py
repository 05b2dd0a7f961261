"""What a reader and an owner of KV blocks say to each other, as plain values.

The same vocabulary as `proto/v1/transfer.proto`; the worker shell converts between the two. The
life cycle is drawn there, in `owner` and in `fetch_state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from baton.core.block import BlockHash, BlockId
from baton.core.request import RequestId, TokenDelta
from baton.core.worker_info import Epoch

LeaseId = NewType("LeaseId", str)
"""Random: knowing it is the permission to renew and to complete the lease."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Reader: send me the chunks of this request. May be repeated after a broken stream."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class FetchPrefix:
    """Reader: lease the leading blocks of this hash chain that you cache now."""

    request_id: RequestId
    """Of the fetch: no request of either worker has this id."""
    block_hashes: tuple[BlockHash, ...]
    """The first of them need not be the first of the prompt."""


@dataclass(frozen=True, slots=True)
class Takeover:
    """Reader: I am to go on with this request of yours. May be repeated after a broken stream."""

    request_id: RequestId
    num_known_tokens: int
    """Output tokens the reader has; those from here on come with the last chunk."""


@dataclass(frozen=True, slots=True)
class Freeze:
    """Reader: I have read all that is announced and have room for the rest; stop now."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Renew:
    """Reader: I am still reading under this lease."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class Complete:
    """Reader: I have read everything; was the lease valid all the time?"""

    lease_id: LeaseId
    epoch: Epoch
    """Epoch of the owner that granted the lease."""


@dataclass(frozen=True, slots=True)
class LayersRead:
    """Reader: I have read all that is announced, and all layers of what LayersReady called so.

    Completed then comes with the chunk that confirms these blocks. Complete follows all the same:
    the lease ends with it.
    """

    request_id: RequestId
    fill_id: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Reader: I will not read this request (any more)."""

    request_id: RequestId
    reason: str


@dataclass(frozen=True, slots=True)
class ChunkReady:
    """Owner: these blocks are complete in memory and leased to the reader."""

    request_id: RequestId
    lease_id: LeaseId
    epoch: Epoch
    lease_s: float
    """Seconds from sending until the lease ends unless it is renewed."""
    first_block_index: int
    """Position in the sequence of the block `block_ids[0]`."""
    block_ids: tuple[BlockId, ...]
    is_last: bool = False
    fill_id: int = 0
    """With `is_last`: the blocks at its end were filled by what LayersReady called so, 0 for
    nothing."""
    first_token: TokenDelta | None = None
    """With `is_last`; handed through unread. After Watch the first token; after Takeover all
    tokens from `num_known_tokens` on; after FetchPrefix None."""


@dataclass(frozen=True, slots=True)
class LayersReady:
    """Owner: the first layers of these blocks are complete; the rest is being computed.

    They are not leased yet. What is read of them is worth something only once ChunkReady has named
    the same blocks and the same `fill_id`.
    """

    request_id: RequestId
    fill_id: int
    """Of one computation in the life of the owner's process."""
    first_block_index: int
    """All blocks before it are announced."""
    block_ids: tuple[BlockId, ...]
    """To the end of the prompt."""
    num_layers: int


@dataclass(frozen=True, slots=True)
class Completed:
    """Owner: the answer to Complete. Not valid: what was read must be thrown away."""

    lease_id: LeaseId
    valid: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Owner: this request will not be delivered."""

    request_id: RequestId
    reason: str


ReaderMessage = Watch | FetchPrefix | Takeover | Freeze | Renew | Complete | LayersRead | GiveUp
OwnerMessage = ChunkReady | LayersReady | Completed | Refused
