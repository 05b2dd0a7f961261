"""A transport whose blocks are moved by a `Mover`: cards, the choice of a link, the event loop.

    card ─► verified ─► for each link, best first: opened ─► added ─► timed ─► in use
                                                     │          │        │
                                                     └──────────┴────────┴─► the next one

Order of the checks on a card: signature, version, nonce, expiry, shape, layout (`metadata`), not
ourselves; then a link opens its part and proves that it reaches the process that made the card.
The first link that also reads into our scratch blocks is taken; why the others were not is kept.

Not known here: how a link moves bytes (`link`), when (`mover`), and what for (`transport`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar
from weakref import WeakValueDictionary

from baton.core.block import BlockId
from baton.core.errors import (
    IncompatiblePeer,
    PeerGone,
    TransferError,
    TransferTimeout,
)
from baton.core.fabric import LinkReport
from baton.core.logging import log_fields
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.block_read import BlockRead, MoverCounters, MoverLimits
from kvtransfer.link import OpenedPeer, PeerLink
from kvtransfer.link_set import LinkSet
from kvtransfer.link_timing import LinkTiming, time_link
from kvtransfer.metadata import (
    CARD_LIFETIME_S,
    PeerCard,
    PeerIdentity,
    check_compatible,
    open_card,
    seal_card,
)
from kvtransfer.mover import Mover
from kvtransfer.peer_process import host_id, pid_namespace
from kvtransfer.plan import BlockIds, PairPlan, RankPool, checked_pair, layer_units, plan_pair
from kvtransfer.transport import PoolRegion, ReadStats, UnitIds, UnitsPerBlock

logger = logging.getLogger(__name__)
T = TypeVar("T")

OPEN_TIMEOUT_S = 60.0
"""Opening a link loads libraries and takes half a second on a quiet machine."""
PEER_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 20.0
TIMED_ROUNDS = 3
TIMED_READ_TIMEOUT_S = 2.0
"""A link that does not answer one small read within this time is not taken."""


@dataclass(frozen=True, slots=True)
class _Peer:
    card: PeerCard
    plan: PairPlan
    layer_plan: PairPlan | None
    """None where its link moves whole units alone."""
    report: LinkReport


class MoverTransport:
    """Implements `Transport` over `PeerLink`s, best first."""

    def __init__(
        self,
        *,
        links: Sequence[PeerLink],
        region: PoolRegion,
        identity: PeerIdentity,
        secret: bytes,
        limits: MoverLimits | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the links; takes half a second with NIXL. Raises TransferError when none can."""
        self._region = region
        self._pool = RankPool(region.layout, region.tp_rank, region.tp_size, region.num_blocks)
        self._identity = identity
        self._secret = secret
        self._wall_clock = wall_clock
        self._peers: dict[WorkerId, _Peer] = {}
        self._connecting: WeakValueDictionary[WorkerId, asyncio.Lock] = WeakValueDictionary()
        self._is_closed = False
        self._links = LinkSet(links)
        self._mover = Mover(
            self._links,
            pool_bytes=region.num_bytes,
            limits=limits or MoverLimits(),
            name="kv-mover",
        )
        self._mover.start(timeout_s=OPEN_TIMEOUT_S)

    @property
    def name(self) -> str:
        return self._links.links[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """All that are offered, the preferred one first."""
        return tuple(link.name for link in self._links.links)

    @property
    def obstacles(self) -> dict[str, str]:
        """Why transports that were wanted are not offered."""
        return self._links.obstacles

    @property
    def counters(self) -> MoverCounters:
        return self._mover.counters

    @property
    def num_recycles(self) -> int:
        """How often a link had to be rebuilt."""
        return self._mover.counters.recycles

    def card(self, nonce: bytes) -> bytes:
        return seal_card(self.unsigned_card(nonce), self._secret)

    def unsigned_card(self, nonce: bytes) -> PeerCard:
        """What `card` signs."""
        now_s = self._wall_clock()
        return PeerCard(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            layout=self._region.layout,
            num_blocks=self._region.num_blocks,
            num_scratch_blocks=self._region.num_scratch_blocks,
            tp_rank=self._region.tp_rank,
            tp_size=self._region.tp_size,
            host_id=host_id(),
            pid_namespace=pid_namespace(),
            pid=os.getpid(),
            endpoints=self._links.endpoints,
            nonce=nonce,
            issued_at_s=now_s,
            expires_at_s=now_s + CARD_LIFETIME_S,
        )

    def verify(self, card: bytes, *, nonce: bytes) -> PeerCard:
        """All checks of a card that need no contact to the peer. Raises as `connect` does."""
        peer = open_card(card, self._secret, now_s=self._wall_clock(), nonce=nonce)
        check_compatible(peer, layout=self._region.layout)
        if peer.worker_id == self._identity.worker_id:
            raise IncompatiblePeer(f"{peer.worker_id} is this worker's own name; choose another")
        return peer

    async def connect(self, card: bytes, *, nonce: bytes) -> tuple[WorkerId, Epoch]:
        self._check_open()
        peer = self.verify(card, nonce=nonce)
        plan = plan_pair(peer.pool, self._pool)
        if plan is None:
            raise IncompatiblePeer(f"rank {peer.tp_rank} of {peer.worker_id} has no heads for us")
        lock = self._connecting.setdefault(peer.name, asyncio.Lock())
        async with lock:
            if not await self._is_in_use(peer):
                await self._choose_link(peer, plan)
        return peer.name, peer.epoch

    def link(self, peer: WorkerId) -> LinkReport | None:
        known = self._peers.get(peer)
        return known.report if known is not None else None

    def units_per_block(self, peer: WorkerId) -> UnitsPerBlock:
        plan = self._connected(peer).plan
        return UnitsPerBlock(plan.remote.units_per_block, plan.local.units_per_block)

    def num_layers(self, peer: WorkerId) -> int:
        has_plan = self._connected(peer).layer_plan is not None
        return self._region.layout.num_layers if has_plan else 0

    async def measure(self, peer: WorkerId, *, num_rounds: int, timeout_s: float) -> LinkReport:
        known = self._connected(peer)
        timing = await self._time(known.card, known.plan, num_rounds, timeout_s)
        known = replace(self._connected(peer), report=_timed(known.report, timing))
        self._peers[peer] = known
        return known.report

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
        there, here = known.plan.remote, known.plan.local
        num_scratch_there = known.card.num_scratch_blocks * there.units_per_block
        num_scratch_here = self._region.num_scratch_blocks * here.units_per_block
        remote_ids, local_ids = checked_pair(
            remote,
            local,
            peer=peer,
            num_remote_blocks=there.num_units - num_scratch_there,
            num_local_blocks=here.num_units - num_scratch_here,
        )
        plan = known.plan
        if layers is not None:
            num_layers = self.num_layers(peer)
            if known.layer_plan is None or not 0 <= layers.start < layers.stop <= num_layers:
                raise TransferError(
                    f"layers {layers.start} to {layers.stop} of {peer}, which can be read by "
                    f"{num_layers} layers"
                )
            plan = known.layer_plan
            remote_ids = layer_units(remote_ids, layers, num_layers)
            local_ids = layer_units(local_ids, layers, num_layers)
        return await self._move(peer, plan, remote_ids, local_ids, timeout_s)

    def settled(self) -> list[BlockId]:
        return self._mover.settled()

    async def recycle(self) -> None:
        """Rebuild the links: the one hard cancel. All given-up blocks are settled afterwards."""
        self._check_open()
        await asyncio.wrap_future(self._mover.recycle())

    async def disconnect(self, peer: WorkerId) -> None:
        self._check_open()
        self._peers.pop(peer, None)
        await self._call(lambda: self._remove(peer, "disconnected"))

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.to_thread(self._mover.stop, timeout_s=CLOSE_TIMEOUT_S)

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferError("the transport is closed")

    def _connected(self, peer: WorkerId) -> _Peer:
        self._check_open()
        known = self._peers.get(peer)
        if known is None:
            raise PeerGone(f"{peer} is not connected")
        return known

    async def _is_in_use(self, card: PeerCard) -> bool:
        """The same process, reached in the same ways, is connected and alive."""
        known = self._peers.get(card.name)
        if known is None:
            return False
        anew = replace(
            known.card,
            nonce=card.nonce,
            issued_at_s=card.issued_at_s,
            expires_at_s=card.expires_at_s,
        )
        if anew != card:
            return False
        return not await self._call(lambda: self._links.is_peer_dead(card.name))

    async def _choose_link(self, card: PeerCard, plan: PairPlan) -> None:
        """Raises PeerGone when trying again may help, IncompatiblePeer otherwise."""
        refused = [f"{name}: {reason}" for name, reason in self.obstacles.items()]
        may_recover = False
        for link in self._links.links:
            layer_plan = None
            if link.reads_layers:
                layer_plan = plan_pair(card.pool, self._pool, by_layer=True)
            try:
                timing = await self._try_link(link, card, plan, layer_plan)
            except (IncompatiblePeer, PeerGone, TransferTimeout) as error:
                refused.append(f"{link.name}: {error}")
                may_recover |= not isinstance(error, IncompatiblePeer)
                continue
            report = LinkReport(
                card.name, card.epoch, link.name, link.lane, reason="; ".join(refused)
            )
            self._peers[card.name] = _Peer(card, plan, layer_plan, _timed(report, timing))
            _log_link(self._peers[card.name].report)
            return
        kind = PeerGone if may_recover else IncompatiblePeer
        raise kind(f"no KV transport reaches {card.name}: {'; '.join(refused)}")

    async def _try_link(
        self, link: PeerLink, card: PeerCard, plan: PairPlan, layer_plan: PairPlan | None
    ) -> LinkTiming | None:
        """Add the peer by this link, in place of the former one; None: there is no scratch block
        to read into."""
        peer = card.name
        opened = await _open_peer(link, card, plan, layer_plan)
        self._peers.pop(peer, None)
        try:
            await self._call(lambda: self._add(peer, link, opened))
            if not self._region.num_scratch_blocks:
                return None
            return await self._time(card, plan, TIMED_ROUNDS, TIMED_READ_TIMEOUT_S)
        except BaseException:
            self._mover.call(lambda: self._remove(peer, "its timed reads failed"))
            raise

    async def _time(
        self, card: PeerCard, plan: PairPlan, num_rounds: int, timeout_s: float
    ) -> LinkTiming:
        async def read(remote: BlockIds, local: BlockIds) -> ReadStats:
            return await self._move(card.name, plan, remote, local, timeout_s, is_scratch=True)

        return await time_link(
            read, plan, num_scratch_blocks=self._region.num_scratch_blocks, num_rounds=num_rounds
        )

    async def _move(
        self,
        peer: WorkerId,
        plan: PairPlan,
        remote: BlockIds,
        local: BlockIds,
        timeout_s: float,
        *,
        is_scratch: bool = False,
    ) -> ReadStats:
        if not len(local):
            return ReadStats(0, 0, 0.0)
        deadline_s = time.monotonic() + timeout_s
        read = BlockRead(peer, plan, remote, local, deadline_s, is_scratch=is_scratch)
        self._mover.read(read)
        try:
            return await asyncio.wrap_future(read.future)
        except asyncio.CancelledError:
            self._mover.give_up(read)
            raise

    async def _call(self, function: Callable[[], T]) -> T:
        future: Future[T] = self._mover.call(function)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), PEER_TIMEOUT_S)
        except TimeoutError:
            raise TransferTimeout(f"the KV mover is busy for {PEER_TIMEOUT_S:g} s") from None

    def _add(self, peer: WorkerId, link: PeerLink, opened: OpenedPeer) -> None:
        """On the mover's thread."""
        self._remove(peer, "replaced by a new connection")
        self._links.add_peer(peer, link, opened)

    def _remove(self, peer: WorkerId, reason: str) -> None:
        """On the mover's thread."""
        if self._links.is_peer_dead(peer):
            self._mover.fail_peer(peer, PeerGone(f"{peer}: its process has ended"))
        else:
            self._mover.leave_peer(peer, reason)


async def _open_peer(
    link: PeerLink, card: PeerCard, plan: PairPlan, layer_plan: PairPlan | None
) -> OpenedPeer:
    """Off the event loop; what is opened for a caller that has gone away is closed again."""
    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(None, link.open_peer, card, plan, layer_plan)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(opening: asyncio.Future[OpenedPeer]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _timed(report: LinkReport, timing: LinkTiming | None) -> LinkReport:
    if timing is None:
        return report
    return replace(report, bytes_per_second=timing.bytes_per_second, latency_s=timing.latency_s)


def _log_link(report: LinkReport) -> None:
    log_fields(
        logger,
        f"{report.peer_id} is read by {report.transport} ({report.lane})",
        peer=report.peer_id,
        transport=report.transport,
        lane=report.lane,
        bytes_per_second=round(report.bytes_per_second),
        latency_s=round(report.latency_s, 6),
        reason=report.reason,
    )
