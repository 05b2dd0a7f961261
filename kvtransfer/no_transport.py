"""A pool that no other worker can read, and that reads from none.

For workers that compute their own prompts: the card says so, and whoever connects is told why
nothing will come. Everything is refused before memory is touched.
"""

from __future__ import annotations

from baton.core.block import BlockId
from baton.core.errors import IncompatiblePeer, PeerGone
from baton.core.fabric import LinkReport
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.transport import ReadStats, UnitIds, UnitsPerBlock

NAME = "none"


class NoTransport:
    """Implements `Transport` by refusing."""

    def __init__(self, reason: str) -> None:
        """`reason`: why there is no transport, for those who want one."""
        self._reason = reason

    @property
    def name(self) -> str:
        return NAME

    def card(self, nonce: bytes) -> bytes:
        """Empty, which every transport refuses as no valid card."""
        return b""

    async def connect(self, card: bytes, *, nonce: bytes) -> tuple[WorkerId, Epoch]:
        raise IncompatiblePeer(f"this worker exchanges no KV: {self._reason}")

    def link(self, peer: WorkerId) -> LinkReport | None:
        return None

    def num_layers(self, peer: WorkerId) -> int:
        raise self._gone(peer)

    def units_per_block(self, peer: WorkerId) -> UnitsPerBlock:
        raise self._gone(peer)

    async def measure(self, peer: WorkerId, *, num_rounds: int, timeout_s: float) -> LinkReport:
        raise self._gone(peer)

    async def read(
        self,
        peer: WorkerId,
        remote: UnitIds,
        local: UnitIds,
        *,
        timeout_s: float,
        layers: range | None = None,
    ) -> ReadStats:
        raise self._gone(peer)

    def settled(self) -> list[BlockId]:
        return []

    async def disconnect(self, peer: WorkerId) -> None:
        """Nobody is connected."""

    async def close(self) -> None:
        """Nothing is open."""

    def _gone(self, peer: WorkerId) -> PeerGone:
        return PeerGone(f"{peer} is not connected: this worker exchanges no KV ({self._reason})")
