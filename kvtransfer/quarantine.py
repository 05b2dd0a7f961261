"""Blocks that a given-up read may still write to.

    held ──settle──► free again          a block named by `settle` before `hold` came is never held

A link cannot always stop a read, so its destination blocks must not be reused until the link says
that nothing can land in them any more. Two accounts use this: a transport keeps what it may still
write (`Mover`), the fetcher keeps what it told the engine to withhold, and joins the two orders in
which "given up" and "settled" can arrive. Pure bookkeeping, no clock, no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from baton.core.block import BlockId


class Quarantine:
    """A multiset of held blocks and of settlements that came first."""

    def __init__(self) -> None:
        self._held: Counter[BlockId] = Counter()
        self._settled_early: Counter[BlockId] = Counter()

    def __len__(self) -> int:
        return self._held.total()

    def __contains__(self, block_id: BlockId) -> bool:
        return block_id in self._held

    @property
    def is_empty(self) -> bool:
        """Nothing is held and no settlement waits for its hold."""
        return not self._held and not self._settled_early

    def hold(self, block_ids: Iterable[BlockId]) -> list[BlockId]:
        """Withhold blocks; returns those that are really unsettled."""
        unsettled = []
        for block_id in block_ids:
            if self._settled_early[block_id] > 0:
                _take(self._settled_early, block_id)
            else:
                self._held[block_id] += 1
                unsettled.append(block_id)
        self._settled_early += Counter()
        return unsettled

    def settle(self, block_ids: Iterable[BlockId]) -> list[BlockId]:
        """Nothing can land in these any more; returns those that were held and are free now."""
        freed = []
        for block_id in block_ids:
            if block_id not in self._held:
                self._settled_early[block_id] += 1
                continue
            _take(self._held, block_id)
            if block_id not in self._held:
                freed.append(block_id)
        return freed

    def check_integrity(self) -> None:
        """Raises AssertionError when a block is held and settled at once."""
        assert all(count > 0 for count in self._held.values())
        assert all(count > 0 for count in self._settled_early.values())
        assert not self._held.keys() & self._settled_early.keys()


def _take(counter: Counter[BlockId], block_id: BlockId) -> None:
    counter[block_id] -= 1
    if not counter[block_id]:
        del counter[block_id]
