"""Blocks that are filled from elsewhere before any request asks for them.

    reserve ──► the caller reads into the blocks ──► finish    the valid ones become cached
                                                └──► abandon   [─► recover]

An import names a hash chain. The leading blocks that are cached already are held, so that what is
read has something to follow; the rest is reserved. Once finished, the blocks are cached like any
others, the newest of all, and a request finds them as it finds every prefix.

Not known here: sequences, who reads, from where and how fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from baton.core.block import BlockHash, BlockId
from baton.core.errors import InvalidRequest, NotFound
from baton.core.request import RequestId
from baton.engine.block_pool import BlockPool
from baton.engine.handoff import Reservation


@dataclass(frozen=True, slots=True)
class _Import:
    hashes: tuple[BlockHash, ...]
    """Of the blocks, in order."""
    block_ids: tuple[BlockId, ...]
    num_cached_blocks: int


class ImportTable:
    """Imports on their way, by id."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._imports: dict[RequestId, _Import] = {}

    def __len__(self) -> int:
        return len(self._imports)

    def __contains__(self, import_id: RequestId) -> bool:
        return import_id in self._imports

    def tables(self) -> Iterable[SequenceOf[BlockId]]:
        """The blocks that each import holds."""
        return (one.block_ids for one in self._imports.values())

    def reserve(
        self, import_id: RequestId, hashes: SequenceOf[BlockHash], *, num_kept_back: int
    ) -> Reservation | None:
        """Hold the cached part of a chain and as many blocks for the rest as fit.

        `num_kept_back` available blocks stay available. None when nothing is missing or nothing
        fits; nothing is held then. Raises InvalidRequest for an id in use.
        """
        if import_id in self._imports:
            raise InvalidRequest(f"import {import_id} exists already; use a new id")
        pool = self._pool
        cached = pool.match(hashes)
        # Holding a cached block makes it unavailable too.
        num_available = pool.num_available - pool.num_cached_among(cached) - num_kept_back
        num_missing = min(len(hashes) - len(cached), num_available)
        if num_missing < 1:
            return None
        pool.acquire(cached)
        after = cached[-1] if cached else None
        block_ids = (*cached, *pool.allocate(num_missing, after=after, is_reserved=True))
        self._imports[import_id] = _Import(tuple(hashes[: len(block_ids)]), block_ids, len(cached))
        return Reservation(import_id, block_ids, len(cached))

    def finish(self, import_id: RequestId, num_blocks: int) -> None:
        """The first `num_blocks` blocks, cached ones counted, are valid; the rest is freed.

        Nothing reads into any of them any more. Raises NotFound, or InvalidRequest for more
        blocks than the import has.
        """
        found = self._get(import_id)
        if not 0 <= num_blocks <= len(found.block_ids):
            raise InvalidRequest(
                f"import {import_id} holds {len(found.block_ids)} blocks, {num_blocks} of them "
                "cannot be valid"
            )
        arrived = range(found.num_cached_blocks, num_blocks)
        self._pool.mark_arrived(found.block_ids[i] for i in arrived)
        for i in arrived:
            self._pool.commit(found.block_ids[i], found.hashes[i])
        self._pool.release(found.block_ids)
        del self._imports[import_id]

    def abandon(self, import_id: RequestId, unsettled: SequenceOf[BlockId]) -> None:
        """Give up an import. Reads may still land in `unsettled`, which stay out of use.

        Raises NotFound, or InvalidRequest when `unsettled` are not blocks it reads into.
        """
        found = self._get(import_id)
        gone = set(unsettled)
        if len(gone) < len(unsettled) or not gone <= {*found.block_ids[found.num_cached_blocks :]}:
            raise InvalidRequest(
                f"import {import_id} does not read into each of the blocks {list(unsettled)} once"
            )
        self._pool.quarantine(unsettled)
        self._pool.release([b for b in found.block_ids if b not in gone])
        del self._imports[import_id]

    def _get(self, import_id: RequestId) -> _Import:
        found = self._imports.get(import_id)
        if found is None:
            raise NotFound(f"import {import_id} does not exist on this worker, or has ended")
        return found
