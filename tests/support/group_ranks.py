"""Ranks in memory for the tests of groups: a pool as an array, reads that the test ends by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.block import BlockId
from baton.core.errors import PeerGone, TransferError, TransferTimeout
from baton.core.fabric import LinkReport
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import CARD_LIFETIME_S, PeerCard, open_card, seal_card
from kvtransfer.plan import plan_pair
from kvtransfer.transport import PoolRegion, ReadStats, UnitsPerBlock

SECRET = b"secret"
NONCE = bytes(16)
LAYOUT = KvLayout("m", 2, 4, 2, 16, "bfloat16")


@dataclass(eq=False)
class HandRead:
    """A read in flight."""

    peer: WorkerId
    local: list[BlockId]
    future: asyncio.Future[ReadStats]
    is_given_up: bool = False
    layers: range | None = None

    def land(self) -> None:
        self.future.set_result(ReadStats(100 * len(self.local), 1, 0.5))

    def fail(self, error: TransferError) -> None:
        self.is_given_up = isinstance(error, TransferTimeout)
        self.future.set_exception(error)


@dataclass(eq=False)
class HandRank:
    """Implements `CardTransport`; reads end when the test says so."""

    region: PoolRegion
    worker_id: WorkerId
    epoch: Epoch
    name: str = "hand"
    generation: int = 1
    """A new one is a new process id in the card."""
    num_recycles: int = 0
    reads: list[HandRead] = field(default_factory=list)
    peers: dict[WorkerId, PeerCard] = field(default_factory=dict)
    refusal: TransferError | None = None
    """Of the next connection."""
    is_closed: bool = False
    _settled: list[BlockId] = field(default_factory=list)

    def unsigned_card(self, nonce: bytes) -> PeerCard:
        now_s = time.time()
        return PeerCard(
            worker_id=self.worker_id,
            epoch=self.epoch,
            layout=self.region.layout,
            num_blocks=self.region.num_blocks,
            num_scratch_blocks=self.region.num_scratch_blocks,
            tp_rank=self.region.tp_rank,
            tp_size=self.region.tp_size,
            host_id="host",
            pid_namespace="pids",
            pid=self.generation,
            endpoints=(),
            nonce=nonce,
            issued_at_s=now_s,
            expires_at_s=now_s + CARD_LIFETIME_S,
        )

    def card(self, nonce: bytes) -> bytes:
        return seal_card(self.unsigned_card(nonce), SECRET)

    async def connect(self, card: bytes, *, nonce: bytes) -> tuple[WorkerId, Epoch]:
        opened = open_card(card, SECRET, now_s=time.time(), nonce=nonce)
        assert plan_pair(opened.pool, self.region.rank_pool) is not None
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        self.peers[opened.name] = opened
        return opened.name, opened.epoch

    def link(self, peer: WorkerId) -> LinkReport | None:
        card = self.peers.get(peer)
        if card is None:
            return None
        rate = 100.0 * (card.tp_rank + 1)
        return LinkReport(peer, card.epoch, self.name, f"lane {card.tp_rank}", rate, 0.25)

    def units_per_block(self, peer: WorkerId) -> UnitsPerBlock:
        plan = plan_pair(self._card(peer).pool, self.region.rank_pool)
        assert plan is not None
        return UnitsPerBlock(plan.remote.units_per_block, plan.local.units_per_block)

    def num_layers(self, peer: WorkerId) -> int:
        self._card(peer)
        return self.region.layout.num_layers

    async def measure(self, peer: WorkerId, *, num_rounds: int, timeout_s: float) -> LinkReport:
        self._card(peer)
        report = self.link(peer)
        assert report is not None
        return report

    async def read(
        self,
        peer: WorkerId,
        remote: Sequence[BlockId],
        local: Sequence[BlockId],
        *,
        timeout_s: float,
        layers: range | None = None,
    ) -> ReadStats:
        self._card(peer)
        if max(local) >= self.region.num_blocks * self.units_per_block(peer).local:
            raise TransferError(f"block id {max(local)} is outside the local pool")
        read = HandRead(
            peer, list(local), asyncio.get_running_loop().create_future(), layers=layers
        )
        self.reads.append(read)
        try:
            return await read.future
        except asyncio.CancelledError:
            read.is_given_up = True
            raise

    def settle(self, read: HandRead) -> None:
        """Nothing of a given-up read is written any more."""
        assert read.is_given_up
        per_block = self.units_per_block(read.peer).local if read.peer in self.peers else 1
        self._settled += dict.fromkeys(BlockId(unit // per_block) for unit in read.local)

    def settled(self) -> list[BlockId]:
        settled, self._settled = self._settled, []
        return settled

    async def disconnect(self, peer: WorkerId) -> None:
        self.peers.pop(peer, None)

    async def close(self) -> None:
        self.is_closed = True

    def _card(self, peer: WorkerId) -> PeerCard:
        if peer not in self.peers:
            raise PeerGone(f"{peer} is not connected")
        return self.peers[peer]


def hand_ranks(
    size: int,
    *,
    layout: KvLayout = LAYOUT,
    num_blocks: int = 8,
    worker_id: str = "decode-0",
    epoch: str = "e1",
) -> list[HandRank]:
    return [
        HandRank(
            PoolRegion(0, 0, num_blocks, layout, tp_rank=rank, tp_size=size),
            WorkerId(worker_id),
            Epoch(epoch),
        )
        for rank in range(size)
    ]
