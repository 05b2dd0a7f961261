"""The seam between KV movement and the link that does it.

A worker has one `Transport` over its one KV pool. Peers are known by their cards (see
`metadata`), exchanged over the control plane and verified before `connect`. Movement is always a
read by the receiver: `read(peer, remote_ids, local_ids)`.

Ids are units: the tokens of one unit are the smaller block of the two pools, so between equal
block sizes a unit is a block. In a pool whose blocks are r times as long, block b is the units
r*b .. r*b + r-1 (`units_per_block` of each side, see `plan`).

Not known here: which request a read belongs to, leases, when to read. `fetcher` decides that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.core.block import BlockId
from baton.core.fabric import LinkReport
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.plan import BlockIds, RankPool

UnitIds = Sequence[BlockId] | BlockIds
"""Units, see above. An array is taken as it is, which long lists are too slow for."""


@dataclass(frozen=True, slots=True)
class PoolRegion:
    """The local KV pool as the transports see it: plain memory."""

    address: int
    num_bytes: int
    num_blocks: int
    """All of them, with the scratch blocks at the end."""
    layout: KvLayout
    """Of the whole model, whatever part of its heads lies here."""
    device_id: int | None = None
    """CUDA ordinal, None for host memory."""
    num_scratch_blocks: int = 0
    """The last blocks of the pool, which hold no KV: timed reads of a link write there."""
    tp_rank: int = 0
    """Of the pool: 0 of 1 where it holds all heads of the model."""
    tp_size: int = 1

    @property
    def rank_pool(self) -> RankPool:
        """What plans with peers are made of."""
        return RankPool(self.layout, self.tp_rank, self.tp_size, self.num_blocks)


class ReadStats(NamedTuple):
    """One finished read."""

    num_bytes: int
    num_descriptors: int
    """After merging runs of consecutive ids."""
    seconds: float


class UnitsPerBlock(NamedTuple):
    """At least one of the two is 1."""

    remote: int
    local: int


class Transport(Protocol):
    """All methods are called on the event loop's thread; reads run elsewhere."""

    @property
    def name(self) -> str:
        """The preferred one: nixl, shm, socket, none or fake; `link` says what serves a peer."""
        ...

    def card(self, nonce: bytes) -> bytes:
        """This process's card, signed over the nonce of the peer that asked for it."""
        ...

    async def connect(self, card: bytes, *, nonce: bytes) -> tuple[WorkerId, Epoch]:
        """Verify a peer's card, made for our `nonce`, choose and time the link to it.

        Replaces an older epoch of the peer.

        Raises BadPeerCard, IncompatiblePeer (readable reason) or PeerGone.
        """
        ...

    def link(self, peer: WorkerId) -> LinkReport | None:
        """What was found and measured when the peer was connected; None for unknown peers."""
        ...

    def units_per_block(self, peer: WorkerId) -> UnitsPerBlock:
        """How ids of the two pools count for this peer. Raises PeerGone when not connected."""
        ...

    def num_layers(self, peer: WorkerId) -> int:
        """Into how many layers a read from this peer can be divided; 0: whole units alone. Raises
        PeerGone when not connected."""
        ...

    async def measure(self, peer: WorkerId, *, num_rounds: int, timeout_s: float) -> LinkReport:
        """Time reads into the scratch blocks again. Raises as `read` does."""
        ...

    async def read(
        self,
        peer: WorkerId,
        remote: UnitIds,
        local: UnitIds,
        *,
        timeout_s: float,
        layers: range | None = None,
    ) -> ReadStats:
        """Copy the peer's units `remote[i]` into our units `local[i]`; of these `layers` alone,
        where `num_layers` is not 0.

        Raises PeerGone (nothing will be written any more), or TransferTimeout: the read was given
        up on but may still land, so the caller quarantines the blocks of `local` until `settled`
        names them.
        A cancelled call counts as given up, whatever had become of the read by then. Any other
        TransferError: refused before anything was moved.
        """
        ...

    def settled(self) -> list[BlockId]:
        """Our blocks (not units) of given-up reads that nothing writes to any more.

        Each is named once per read, when the last of its units is safe.
        """
        ...

    async def disconnect(self, peer: WorkerId) -> None:
        """Forget a peer. Its outstanding reads fail with PeerGone or end in quarantine."""
        ...

    async def close(self) -> None:
        """Stop all movement and free the link's resources. The pool outlives this call."""
        ...
