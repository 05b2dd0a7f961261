"""One import ends exactly once towards the engine, whatever becomes of its source."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from baton.core.block import BlockHash, BlockId
from baton.core.request import RequestId
from baton.engine.engine import Reservation
from services.worker.kv_import import KvImport

NAME = RequestId("import")
HASHES = tuple(BlockHash(bytes([i]) * 16) for i in range(4))


class Engine:
    """Holds one cached block of the chain and reserves the rest."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, int]] = []

    async def reserve_import(
        self, import_id: RequestId, hashes: Sequence[BlockHash]
    ) -> Reservation | None:
        return Reservation(import_id, tuple(BlockId(i) for i in range(len(hashes))), 1)

    def finish_import(self, import_id: RequestId, *, num_blocks: int) -> None:
        self.ends.append(("finished", num_blocks))

    def abandon_import(self, import_id: RequestId, *, unsettled: Sequence[BlockId]) -> None:
        self.ends.append(("abandoned", len(unsettled)))


class Tiers:
    def __init__(self, outcome: int | Exception) -> None:
        self.outcome = outcome

    async def restore(self, block_hashes: Sequence[BlockHash], block_ids: Sequence[BlockId]) -> int:
        assert tuple(block_hashes) == HASHES[1:] and len(block_ids) == 3
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


async def test_what_came_from_the_tiers_is_cached():
    engine = Engine()
    assert await KvImport(NAME, HASHES, engine).restore(Tiers(2)) == 3
    assert engine.ends == [("finished", 3)]


async def test_defect_of_a_tier_gives_the_blocks_back():
    engine = Engine()
    with pytest.raises(OSError, match="drive"):
        await KvImport(NAME, HASHES, engine).restore(Tiers(OSError("the drive is on fire")))
    assert engine.ends == [("finished", 1)]
