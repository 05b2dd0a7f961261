"""The seam between KV movement and the link that does it.

A worker has one `Transport` over its one KV pool. Peers are known by their cards (see
`metadata`), exchanged over the control plane and verified before `connect`. Movement is always a
read by the receiver: `read(peer, remote_block_ids, local_block_ids)`.

Not known here: which request a read belongs to, leases, when to read. `fetcher` decides that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.core.block import BlockId
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId


@dataclass(frozen=True, slots=True)
class PoolRegion:
    """The local KV pool as the transports see it: plain memory."""

    address: int
    num_bytes: int
    num_blocks: int
    layout: KvLayout
    device_id: int | None = None
    """CUDA ordinal, None for host memory."""


class ReadStats(NamedTuple):
    """One finished read."""

    num_bytes: int
    num_descriptors: int
    """After merging runs of consecutive ids."""
    seconds: float


class Transport(Protocol):
    """All methods are called on the event loop's thread; reads run elsewhere."""

    @property
    def name(self) -> str:
        """nixl, shm or fake; said in the log, in WorkerInfo and in metrics."""
        ...

    def card(self) -> bytes:
        """This process's signed card, to be handed to peers over the control plane."""
        ...

    async def connect(self, card: bytes) -> tuple[WorkerId, Epoch]:
        """Verify a peer's card and make the peer readable; replaces an older epoch of it.

        Raises BadPeerCard, IncompatiblePeer (readable reason) or PeerGone.
        """
        ...

    async def read(
        self,
        peer: WorkerId,
        remote: Sequence[BlockId],
        local: Sequence[BlockId],
        *,
        timeout_s: float,
    ) -> ReadStats:
        """Copy the peer's blocks `remote[i]` into our blocks `local[i]`.

        Raises PeerGone (nothing will be written any more), or TransferTimeout: the read was given
        up on but may still land, so the caller quarantines `local` until `settled` names them.
        A cancelled call counts as given up, whatever had become of the read by then. Any other
        TransferError: refused before anything was moved.
        """
        ...

    def settled(self) -> list[BlockId]:
        """Blocks of given-up reads that can no longer be written to, each reported once."""
        ...

    async def disconnect(self, peer: WorkerId) -> None:
        """Forget a peer. Its outstanding reads fail with PeerGone or end in quarantine."""
        ...

    async def close(self) -> None:
        """Stop all movement and free the link's resources. The pool outlives this call."""
        ...
