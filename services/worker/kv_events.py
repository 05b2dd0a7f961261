"""What the worker tells routers of its blocks: the best tier that each is in, change by change.

    prefix cache of the pool ──(engine's thread, net per step)──┐
    host tier, disk tier ──(other threads, `take_changes`)──────┴─► KvEvent, numbered from 1

A tier says only that something about a block changed; where the block is best is looked up when
the event is made, on the thread that alone changes the prefix cache. So an event is true when it
gets its number, and a change that comes while it is made is in the next one: after the last event
routers know what is where. A block may be named again without having moved.

Belongs to the engine's thread. Does not know: sessions, engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.core.block import BlockHash
from baton.core.tier import Tier

MAX_TIER_CHANGES = 8192
"""Taken over into one event; the rest goes into the next ones."""


class TierContents(Protocol):
    """What is needed of `kvtransfer.tiers.tiers.Tiers`; for any thread."""

    @property
    def has_changes(self) -> bool: ...

    def watch(self) -> None:
        """Keep note of changes from now on."""
        ...

    def take_changes(self, max_blocks: int) -> list[BlockHash]:
        """Blocks that have come to a tier or left one since they were last taken."""
        ...

    def tier_of(self, block_hash: BlockHash) -> Tier | None: ...

    def held(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes in the host tier and in the disk tier."""
        ...


@dataclass(slots=True)
class KvEvent:
    """Where blocks are from now on; each in one of the lists."""

    stored: list[BlockHash] = field(default_factory=list)
    """In the prefix cache."""
    removed: list[BlockHash] = field(default_factory=list)
    """Nowhere."""
    on_host: list[BlockHash] = field(default_factory=list)
    on_disk: list[BlockHash] = field(default_factory=list)

    @property
    def num_hashes(self) -> int:
        return len(self.stored) + len(self.removed) + len(self.on_host) + len(self.on_disk)


class KvEventLog:
    """Numbers the events of one worker."""

    def __init__(self, is_cached: Callable[[BlockHash], bool]) -> None:
        """`is_cached`: whether a block is in the prefix cache now."""
        self.sequence = 0
        """Of the last event."""
        self._is_cached = is_cached
        self._tiers: TierContents | None = None

    def attach(self, tiers: TierContents) -> None:
        """Once, before the first event."""
        self._tiers = tiers
        tiers.watch()

    def next_event(
        self, stored: Sequence[BlockHash], removed: Sequence[BlockHash]
    ) -> KvEvent | None:
        """After the prefix cache changed as said. None, and no number, when there is no news."""
        changed: Iterable[BlockHash] = ()
        if self._tiers is not None and self._tiers.has_changes:
            changed = self._tiers.take_changes(MAX_TIER_CHANGES)
        if not (stored or removed or changed):
            return None
        event = KvEvent(list(stored))
        # In the order given, each once; what is in the prefix cache is told when it leaves it.
        moved = dict.fromkeys(removed)
        moved.update(dict.fromkeys(h for h in changed if not self._is_cached(h)))
        lists = {Tier.HOST: event.on_host, Tier.DISK: event.on_disk}
        for block_hash in moved:
            tier = self._tiers.tier_of(block_hash) if self._tiers is not None else None
            (event.removed if tier is None else lists[tier]).append(block_hash)
        if not event.num_hashes:
            return None
        self.sequence += 1
        return event

    def below(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Hashes whose best tier is the host tier, and the disk tier. O(blocks held there)."""
        if self._tiers is None:
            return [], []
        host, disk = self._tiers.held()
        on_host = [h for h in host if not self._is_cached(h)]
        better = set(on_host)
        return on_host, [h for h in disk if h not in better and not self._is_cached(h)]
