"""One import: blocks reserved in the engine, filled by a peer or the tiers, and given to the cache.

An import belongs to no request. It runs to its own end, so that blocks are given back exactly
once whoever has lost interest; `stop` only makes that end come soon.

Not known here: whether the import pays, who waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.core.block import BlockHash, BlockId
from baton.core.errors import BatonError
from baton.core.request import PeerRef, RequestId
from baton.engine.engine import Reservation

logger = logging.getLogger(__name__)


class ImportEngine(Protocol):
    """The engine's part."""

    async def reserve_import(
        self, import_id: RequestId, hashes: Sequence[BlockHash]
    ) -> Reservation | None: ...
    def finish_import(self, import_id: RequestId, *, num_blocks: int) -> None: ...
    def abandon_import(self, import_id: RequestId, *, unsettled: Sequence[BlockId]) -> None: ...


@dataclass(frozen=True, slots=True)
class PrefixFetched:
    """How a fetch from a peer's cache has ended."""

    num_blocks: int = 0
    """Leading blocks that are valid."""
    unsettled: tuple[BlockId, ...] = ()
    """Blocks that a read may still write to."""
    reason: str = ""
    """Why nothing came, empty when something did."""


class PrefixReader(Protocol):
    """The peers."""

    async def connect(self, peer: PeerRef) -> None:
        """Waits for the link. Raises TransferError."""
        ...

    def fetch_prefix(
        self,
        fetch_id: RequestId,
        peer: PeerRef,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[BlockId],
        *,
        timeout_s: float,
    ) -> asyncio.Future[PrefixFetched]:
        """Read the leading blocks of `hashes` that a connected peer caches. Never raises."""
        ...

    def drop_prefix(self, fetch_id: RequestId) -> None:
        """End a fetch now; its future has its result when this returns. Unknown: ignored."""
        ...


class TierReader(Protocol):
    """The tiers."""

    async def restore(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[BlockId]) -> int:
        """Fill leading blocks; returns how many. May be cancelled; nothing is written after it."""
        ...


class KvImport:
    """One import on its way. `hashes` is the chain from the prompt's first block on."""

    def __init__(
        self, import_id: RequestId, hashes: Sequence[BlockHash], engine: ImportEngine
    ) -> None:
        self.import_id = import_id
        self.hashes = tuple(hashes)
        self._engine = engine
        self._reads: PrefixReader | None = None
        self._restoring: asyncio.Task[int] | None = None
        self._is_stopped = False
        self.num_moved = 0
        """Blocks that came from elsewhere."""
        self.moving_s = 0.0
        """The time that moving them took."""

    def stop(self) -> None:
        """Nobody waits any more: what is under way is given up."""
        self._is_stopped = True
        if self._reads is not None:
            self._reads.drop_prefix(self.import_id)
        if self._restoring is not None:
            self._restoring.cancel()

    async def restore(self, tiers: TierReader) -> int:
        """From the tiers; returns the number of leading blocks of the chain that are cached now."""
        reservation = await self._reserve()
        if reservation is None:
            return 0
        num_valid = reservation.num_cached_blocks
        try:
            if not self._is_stopped:
                self.num_moved = await self._restore(tiers, reservation)
                num_valid += self.num_moved
        finally:
            # Nothing writes to the blocks any more, also after a defect of the tiers.
            self._engine.finish_import(self.import_id, num_blocks=num_valid)
        return num_valid

    async def _restore(self, tiers: TierReader, reservation: Reservation) -> int:
        """How many blocks came; 0 when it was stopped."""
        first = reservation.num_cached_blocks
        hashes = self.hashes[first : len(reservation.block_ids)]
        started_s = asyncio.get_running_loop().time()
        self._restoring = asyncio.create_task(
            _restored(tiers, hashes, reservation.block_ids[first:])
        )
        # A task of its own, so that to stop it does not cancel us.
        await asyncio.wait([self._restoring])
        self.moving_s = asyncio.get_running_loop().time() - started_s
        return 0 if self._restoring.cancelled() else self._restoring.result()

    async def fetch(self, reads: PrefixReader, peer: PeerRef, *, timeout_s: float) -> int:
        """From a peer, within about `timeout_s`; returns as `restore` does."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await reads.connect(peer)
        except (BatonError, TimeoutError) as error:
            logger.info("import %s: no link to %s: %s", self.import_id, peer.worker_id, error)
            return 0
        reservation = None if self._is_stopped else await self._reserve()
        if reservation is None:
            return 0
        first = reservation.num_cached_blocks
        left_s = deadline_s - asyncio.get_running_loop().time()
        if self._is_stopped or left_s <= 0:
            self._engine.abandon_import(self.import_id, unsettled=())
            return 0
        hashes = self.hashes[first : len(reservation.block_ids)]
        self._reads = reads
        fetched = await reads.fetch_prefix(
            self.import_id, peer, hashes, reservation.block_ids[first:], timeout_s=left_s
        )
        self._reads = None
        if not fetched.num_blocks:
            logger.info("import %s: nothing fetched: %s", self.import_id, fetched.reason)
            self._engine.abandon_import(self.import_id, unsettled=fetched.unsettled)
            return 0
        self._engine.finish_import(self.import_id, num_blocks=first + fetched.num_blocks)
        return first + fetched.num_blocks

    async def _reserve(self) -> Reservation | None:
        try:
            return await self._engine.reserve_import(self.import_id, self.hashes)
        except BatonError as error:
            logger.info("import %s: no blocks: %s", self.import_id, error)
            return None


async def _restored(
    tiers: TierReader, hashes: Sequence[BlockHash], block_ids: Sequence[BlockId]
) -> int:
    try:
        return await tiers.restore(hashes, block_ids)
    except BatonError as error:
        logger.info("nothing restored: %s", error)
        return 0
