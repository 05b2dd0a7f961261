"""The transport of a worker whose ranks have a KV pool each. Implements `Transport` on rank 0.

    card      the cards of all ranks (`group_card`)
    connect   every rank of ours connects to the owner's ranks that hold its heads (`plan`)
    read      every rank reads its parts into the same block ids; done when all are done, and the
              first failure ends it on all ranks (`group_read`)
    settled   when no rank can write to a block any more

Each rank has an ordinary transport over its own pool: rank 0 here, the others behind a
`RankProxy`. A worker of one rank uses this too, so that it can read from one of several.

Not known here: how a rank reads, processes, devices.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from baton.core.block import BlockId
from baton.core.errors import PeerGone, TransferError, TransferTimeout
from baton.core.fabric import LinkReport
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.group_card import join_cards, open_cards, split_cards
from kvtransfer.group_read import GroupQuarantine, GroupRead
from kvtransfer.metadata import PeerCard, check_compatible
from kvtransfer.plan import checked_pair, plan_sources
from kvtransfer.transport import PoolRegion, ReadStats, Transport, UnitIds, UnitsPerBlock

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Source:
    """One of our ranks reads its heads, or some of them, from one of the peer's."""

    rank: int
    key: WorkerId
    """What our rank's transport calls the peer's rank."""


@dataclass(frozen=True, slots=True)
class _Peer:
    epoch: Epoch
    sources: tuple[_Source, ...]
    units_per_block: UnitsPerBlock
    num_remote_units: int
    """That may be read."""
    num_local_units: int
    """That may be read into."""


class RankTransport(Transport, Protocol):
    """Over the pool of one rank."""

    @property
    def num_recycles(self) -> int:
        """How often a link had to be rebuilt."""
        ...


class GroupTransport:
    """All methods are called on one event loop's thread."""

    def __init__(
        self,
        ranks: Sequence[RankTransport],
        *,
        region: PoolRegion,
        secret: bytes,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`ranks`: of ranks 0, 1, ...; closed by us. `region`: any rank's, for what is the same
        for all."""
        self._ranks = tuple(ranks)
        self._region = region
        self._secret = secret
        self._wall_clock = wall_clock
        self._peers: dict[WorkerId, _Peer] = {}
        self._reads: set[GroupRead] = set()
        self._quarantine = GroupQuarantine()

    @property
    def name(self) -> str:
        return self._ranks[0].name

    @property
    def size(self) -> int:
        return len(self._ranks)

    @property
    def num_recycles(self) -> int:
        """Of all ranks."""
        return sum(rank.num_recycles for rank in self._ranks)

    def card(self, nonce: bytes) -> bytes:
        return join_cards([rank.card(nonce) for rank in self._ranks])

    async def connect(self, card: bytes, *, nonce: bytes) -> tuple[WorkerId, Epoch]:
        """See `Transport`. A failure on one rank is a failure of all."""
        cards = open_cards(card, self._secret, now_s=self._wall_clock(), nonce=nonce)
        wires = split_cards(card)
        identity = cards[0].identity
        check_compatible(cards[0], layout=self._region.layout)
        layout = self._region.layout
        wanted = [
            (rank, owner)
            for rank in range(self.size)
            for owner in plan_sources(len(cards), rank, self.size, layout.num_kv_heads)
        ]
        outcomes = await asyncio.gather(
            *(self._ranks[rank].connect(wires[owner], nonce=nonce) for rank, owner in wanted),
            return_exceptions=True,
        )
        made, failures = [], []
        for (rank, _), outcome in zip(wanted, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                failures.append(outcome)
            else:
                made.append(_Source(rank, outcome[0]))
        known = self._peers.get(identity.worker_id)
        if failures:
            # Known under this epoch, it is still whole: nothing of it was replaced.
            if known is None or known.epoch != identity.epoch:
                self._peers.pop(identity.worker_id, None)
                await self._drop({*made, *(known.sources if known else ())})
            raise failures[0]
        self._peers[identity.worker_id] = self._peer(cards[0], made)
        if known is not None:
            await self._drop(set(known.sources) - set(made))
        return identity.worker_id, identity.epoch

    def link(self, peer: WorkerId) -> LinkReport | None:
        known = self._peers.get(peer)
        if known is None:
            return None
        reports = [self._ranks[s.rank].link(s.key) for s in known.sources]
        return self._joined(peer, known, [report for report in reports if report is not None])

    def units_per_block(self, peer: WorkerId) -> UnitsPerBlock:
        return self._known(peer).units_per_block

    def num_layers(self, peer: WorkerId) -> int:
        """As few as any rank can."""
        return min(self._ranks[s.rank].num_layers(s.key) for s in self._known(peer).sources)

    async def measure(self, peer: WorkerId, *, num_rounds: int, timeout_s: float) -> LinkReport:
        """All ranks at the same time, as in a read."""
        known = self._known(peer)
        reports = await _all(
            self._ranks[s.rank].measure(s.key, num_rounds=num_rounds, timeout_s=timeout_s)
            for s in known.sources
        )
        joined = self._joined(peer, known, reports)
        if joined is None:
            raise PeerGone(f"{peer} is not connected")
        return joined

    async def read(
        self,
        peer: WorkerId,
        remote: UnitIds,
        local: UnitIds,
        *,
        timeout_s: float,
        layers: range | None = None,
    ) -> ReadStats:
        """See `Transport`. Ids are checked here, for what one rank refuses others may be moving."""
        known = self._known(peer)
        remote, local = checked_pair(
            remote,
            local,
            peer=peer,
            num_remote_blocks=known.num_remote_units,
            num_local_blocks=known.num_local_units,
        )
        units_per_block = known.units_per_block.local

        def block_ids() -> Iterable[BlockId]:
            return map(BlockId, np.unique(local // units_per_block).tolist())

        if len(known.sources) == 1:
            (source,) = known.sources
            try:
                return await self._ranks[source.rank].read(
                    source.key, remote, local, timeout_s=timeout_s, layers=layers
                )
            except (TransferTimeout, asyncio.CancelledError):
                self._quarantine.given_up(block_ids(), 1)
                raise
        read = GroupRead(
            [
                functools.partial(
                    self._ranks[s.rank].read,
                    s.key,
                    remote,
                    local,
                    timeout_s=timeout_s,
                    layers=layers,
                )
                for s in known.sources
            ],
            block_ids=block_ids,
            quarantine=self._quarantine,
            on_over=self._reads.discard,
        )
        self._reads.add(read)
        return await read.result()

    def settled(self) -> list[BlockId]:
        for rank in self._ranks:
            self._quarantine.reported(rank.settled())
        return self._quarantine.settled()

    async def disconnect(self, peer: WorkerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            await self._drop(set(known.sources))

    async def close(self) -> None:
        """Closes all ranks' transports, whatever any of them says to it."""
        self._peers.clear()
        outcomes = await asyncio.gather(
            *(rank.close() for rank in self._ranks), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _peer(self, card: PeerCard, sources: Sequence[_Source]) -> _Peer:
        layout, region = self._region.layout, self._region
        unit_tokens = min(layout.block_size, card.layout.block_size)
        there, here = card.layout.block_size // unit_tokens, layout.block_size // unit_tokens
        return _Peer(
            card.epoch,
            tuple(sources),
            UnitsPerBlock(there, here),
            (card.num_blocks - card.num_scratch_blocks) * there,
            (region.num_blocks - region.num_scratch_blocks) * here,
        )

    def _known(self, peer: WorkerId) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            raise PeerGone(f"{peer} is not connected")
        return known

    async def _drop(self, sources: Iterable[_Source]) -> None:
        outcomes = await asyncio.gather(
            *(self._ranks[s.rank].disconnect(s.key) for s in sources), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, TransferError):
                logger.warning("a rank keeps its link to a peer that left: %s", outcome)
            elif isinstance(outcome, BaseException):
                raise outcome

    def _joined(
        self, peer: WorkerId, known: _Peer, reports: Sequence[LinkReport]
    ) -> LinkReport | None:
        """What the reports of all sources, in their order, say of the worker as a whole."""
        if len(reports) != len(known.sources):
            return None
        if len(reports) == 1:
            return replace(reports[0], peer_id=peer)
        by_rank = itertools.groupby(
            zip(known.sources, reports, strict=True), key=lambda pair: pair[0].rank
        )
        # Ranks read side by side; what one rank reads from several shares its own link.
        rates = [min(report.bytes_per_second for _, report in pairs) for _, pairs in by_rank]
        return LinkReport(
            peer_id=peer,
            peer_epoch=known.epoch,
            transport=_words(report.transport for report in reports),
            lane=_words(report.lane for report in reports),
            bytes_per_second=min(rates) * len(rates),
            latency_s=max(report.latency_s for report in reports),
            reason=_words(report.reason for report in reports),
        )


async def _all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first failure ends the others."""
    tasks: list[Awaitable[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [await task for task in tasks]


def _words(texts: Iterable[str]) -> str:
    """Different ones only."""
    return ", ".join(dict.fromkeys(text for text in texts if text))
