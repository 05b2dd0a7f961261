"""A transport inside one process whose every read obeys the test: delay, drop, late write, death.

    fabric = FakeFabric()
    owner, reader = fabric.transport("prefill-0", ...), fabric.transport("decode-0", ...)
    reader.is_held = True            reads wait in `reader.open_reads` until finish() or expire()
    fabric.kill("prefill-0")         every read of it fails with PeerGone

A held read has no deadline but `expire`. A read that was given up on stays in `open_reads` and
settles only when it is finished by hand or its peer is killed, as a read over a real link would.
Where regions have memory, units are copied by the same plans as over a real link.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from dataclasses import dataclass, field

from baton.core.block import BlockId
from baton.core.errors import IncompatiblePeer, PeerGone, TransferTimeout
from baton.core.fabric import LinkReport
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import (
    CARD_LIFETIME_S,
    PeerCard,
    PeerIdentity,
    check_compatible,
    open_card,
    seal_card,
)
from kvtransfer.plan import Copy, PairPlan, checked_pair, layer_units, plan_pair
from kvtransfer.transport import PoolRegion, ReadStats, UnitIds, UnitsPerBlock

NAME = "fake"


@dataclass(slots=True, eq=False)
class FakeRead:
    """One read as the test sees it; ids are units."""

    peer: WorkerId
    remote: tuple[BlockId, ...]
    local: tuple[BlockId, ...]
    local_blocks: tuple[BlockId, ...]
    """The blocks that `local` are in, each once."""
    copies: list[Copy]
    started_at_s: float
    landed: asyncio.Future[ReadStats] = field(repr=False)
    is_given_up: bool = False
    layers: range | None = None
    """All of them where there is none."""


@dataclass(frozen=True, slots=True)
class _Peer:
    card: PeerCard
    plan: PairPlan
    layer_plan: PairPlan


class FakeFabric:
    """The transports of one test; a killed worker is one that is not in it any more."""

    def __init__(self, secret: bytes = b"fake") -> None:
        self.secret = secret
        self.transports: dict[WorkerId, FakeTransport] = {}

    def transport(self, worker_id: str, epoch: str, region: PoolRegion) -> FakeTransport:
        """A new worker, or a new epoch of one."""
        identity = PeerIdentity(WorkerId(worker_id), Epoch(epoch))
        transport = FakeTransport(self, identity, region)
        self.transports[identity.worker_id] = transport
        return transport

    def kill(self, worker_id: str) -> None:
        """The process of a worker dies: reads of it fail, given-up ones settle."""
        dead = WorkerId(worker_id)
        self.transports.pop(dead, None)
        for transport in self.transports.values():
            transport.peer_died(dead)


class FakeTransport:
    """Implements `Transport`; the attributes and `finish`, `expire` are for the test."""

    def __init__(self, fabric: FakeFabric, identity: PeerIdentity, region: PoolRegion) -> None:
        self.identity = identity
        self.region = region
        self.delay_s = 0.0
        """How long a read takes when it is not held."""
        self.is_held = False
        self.open_reads: list[FakeRead] = []
        self.bytes_per_second = 0.0
        """What `link` and `measure` claim."""
        self.latency_s = 0.0
        self._fabric = fabric
        self._peers: dict[WorkerId, _Peer] = {}
        self._settled: list[BlockId] = []

    @property
    def name(self) -> str:
        return NAME

    def card(self, nonce: bytes) -> bytes:
        now_s = time.time()
        region = self.region
        card = PeerCard(
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            layout=region.layout,
            num_blocks=region.num_blocks,
            num_scratch_blocks=region.num_scratch_blocks,
            tp_rank=region.tp_rank,
            tp_size=region.tp_size,
            host_id="",
            pid_namespace="",
            pid=1,
            endpoints=(),
            nonce=nonce,
            issued_at_s=now_s,
            expires_at_s=now_s + CARD_LIFETIME_S,
        )
        return seal_card(card, self._fabric.secret)

    async def connect(self, card: bytes, *, nonce: bytes) -> tuple[WorkerId, Epoch]:
        peer = open_card(card, self._fabric.secret, now_s=time.time(), nonce=nonce)
        check_compatible(peer, layout=self.region.layout)
        plan = plan_pair(peer.pool, self.region.rank_pool)
        layer_plan = plan_pair(peer.pool, self.region.rank_pool, by_layer=True)
        if plan is None or layer_plan is None:
            raise IncompatiblePeer(f"rank {peer.tp_rank} of {peer.worker_id} has none of our heads")
        self._live(peer)
        self._peers[peer.worker_id] = _Peer(peer, plan, layer_plan)
        return peer.worker_id, peer.epoch

    def link(self, peer: WorkerId) -> LinkReport | None:
        known = self._peers.get(peer)
        if known is None:
            return None
        return LinkReport(
            peer,
            known.card.epoch,
            NAME,
            lane="one process",
            bytes_per_second=self.bytes_per_second,
            latency_s=self.latency_s,
        )

    def units_per_block(self, peer: WorkerId) -> UnitsPerBlock:
        plan = self._connected(peer).plan
        return UnitsPerBlock(plan.remote.units_per_block, plan.local.units_per_block)

    def num_layers(self, peer: WorkerId) -> int:
        self._connected(peer)
        return self.region.layout.num_layers

    async def measure(self, peer: WorkerId, *, num_rounds: int, timeout_s: float) -> LinkReport:
        self._live(self._connected(peer).card)
        report = self.link(peer)
        assert report is not None
        return report

    async def read(
        self,
        peer: WorkerId,
        remote: UnitIds,
        local: UnitIds,
        *,
        timeout_s: float,
        layers: range | None = None,
    ) -> ReadStats:
        known = self._connected(peer)
        read = self._new_read(known, peer, remote, local, layers)
        self._live(known.card)
        self.open_reads.append(read)
        try:
            async with asyncio.timeout(None if self.is_held else timeout_s):
                if not self.is_held:
                    await asyncio.sleep(self.delay_s)
                    self.finish(read)
                return await asyncio.shield(read.landed)
        except TimeoutError:
            self._give_up(read)
            raise TransferTimeout(f"read from {peer} passed its deadline") from None
        except asyncio.CancelledError:
            self._give_up(read)
            raise

    def finish(self, read: FakeRead) -> None:
        """The data lands now, however late."""
        if read not in self.open_reads:
            return
        self.open_reads.remove(read)
        self._copy(read)
        if read.is_given_up:
            self._settled += read.local_blocks
            return
        num_bytes = sum(copy.num_bytes for copy in read.copies)
        seconds = time.monotonic() - read.started_at_s
        read.landed.set_result(ReadStats(num_bytes, len(read.copies), seconds))

    def expire(self, read: FakeRead) -> None:
        """The deadline passes now; the data has not landed yet."""
        if read.is_given_up:
            return
        read.is_given_up = True
        read.landed.set_exception(TransferTimeout(f"read from {read.peer} passed its deadline"))

    def peer_died(self, peer: WorkerId) -> None:
        """Called by the fabric."""
        self._peers.pop(peer, None)
        for read in [r for r in self.open_reads if r.peer == peer]:
            self.open_reads.remove(read)
            if read.is_given_up:
                self._settled += read.local_blocks
            else:
                read.landed.set_exception(PeerGone(f"{peer}: its process has ended"))

    def settled(self) -> list[BlockId]:
        blocks, self._settled = self._settled, []
        return blocks

    async def disconnect(self, peer: WorkerId) -> None:
        self._peers.pop(peer, None)
        for read in [r for r in self.open_reads if r.peer == peer and not r.is_given_up]:
            self.expire(read)

    async def close(self) -> None:
        for peer in list(self._peers):
            await self.disconnect(peer)
        for read in list(self.open_reads):
            self.open_reads.remove(read)
            self._settled += read.local_blocks

    def _connected(self, peer: WorkerId) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            raise PeerGone(f"{peer} is not connected")
        return known

    def _new_read(
        self,
        known: _Peer,
        peer: WorkerId,
        remote: UnitIds,
        local: UnitIds,
        layers: range | None,
    ) -> FakeRead:
        plan = known.plan
        sources, targets = checked_pair(
            remote,
            local,
            peer=peer,
            num_remote_blocks=plan.remote.num_units,
            num_local_blocks=plan.local.num_units,
        )
        moved = plan
        if layers is not None:
            num_layers, moved = self.region.layout.num_layers, known.layer_plan
            sources = layer_units(sources, layers, num_layers)
            targets = layer_units(targets, layers, num_layers)
        return FakeRead(
            peer,
            tuple(map(BlockId, remote)),
            tuple(map(BlockId, local)),
            tuple(dict.fromkeys(BlockId(int(u) // plan.local.units_per_block) for u in local)),
            moved.copies(sources, targets),
            time.monotonic(),
            asyncio.get_running_loop().create_future(),
            layers=layers,
        )

    def _live(self, card: PeerCard) -> FakeTransport:
        peer = self._fabric.transports.get(card.worker_id)
        if peer is None or peer.identity.epoch != card.epoch:
            raise PeerGone(f"{card.worker_id}: its process has ended")
        return peer

    def _give_up(self, read: FakeRead) -> None:
        if read in self.open_reads:
            read.is_given_up = True
        elif not read.is_given_up:
            # It had ended in the very instant in which it was cancelled.
            self._settled += read.local_blocks

    def _copy(self, read: FakeRead) -> None:
        peer = self._fabric.transports.get(read.peer)
        if peer is None or not peer.region.address or not self.region.address:
            return
        for copy in read.copies:
            target, source = self.region.address + copy.local, peer.region.address + copy.remote
            ctypes.memmove(target, source, copy.num_bytes)
