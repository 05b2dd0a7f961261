"""The table that router copies of one Ray application share, inside an actor.

A class without Ray: `ray_store` makes the actor of it. The actor may be restarted with nothing, so
whatever matters can be told again: signs of life bring the slots of running requests, and every
copy mirrors the keys and hands them back to a table of another generation.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from services.router.shared.ledger import LedgerAnswer
from services.router.shared.state import TenantRecord
from services.router.shared.store import Beat, Refund, Take
from services.router.shared.table import SharedTable

MAX_BATCHES = 1024
MAX_BATCH_BYTES = 32 << 20
"""Of placements kept for copies that ask late; the oldest go first."""


class Pulse(NamedTuple):
    """The answer to a sign of life."""

    num_copies: int
    generation: str
    """Of the table: another one has forgotten everything."""
    version: int
    """Of the keys."""
    keys: Mapping[str, TenantRecord] | None
    """All of them, where the caller's version is another."""


class Batches(NamedTuple):
    cursor: int
    batches: Sequence[bytes]


class RayTable:
    """Called by several copies at once, on one event loop."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._table = SharedTable()
        self._generation = secrets.token_hex(8)
        self._version = 0
        self._batches: deque[bytes] = deque()
        self._num_bytes = 0
        self._cursor = 0
        """Number of the next batch."""
        self._has_news = asyncio.Event()

    async def take(self, take: Take) -> LedgerAnswer:
        return self._table.take(take, self._now())

    async def refund(self, refunds: Sequence[Refund]) -> None:
        self._table.refund(refunds, self._now())

    async def beat(self, beat: Beat, generation: str, version: int) -> Pulse:
        """`generation` and `version`: of the keys that the caller mirrors."""
        num_copies = self._table.beat(beat, self._now())
        is_known = generation == self._generation and version == self._version
        keys = None if is_known else self._table.list_keys()
        return Pulse(num_copies, self._generation, self._version, keys)

    async def leave(self, copy_id: str) -> int:
        """The copies that remain."""
        return self._table.leave(copy_id, self._now())

    async def read_key(self, key_hash: str) -> TenantRecord | None:
        return self._table.read_key(key_hash)

    async def write_key(self, key_hash: str, record: TenantRecord) -> None:
        self._table.write_key(key_hash, record)
        self._version += 1

    async def delete_key(self, key_hash: str) -> bool:
        was_there = self._table.delete_key(key_hash)
        self._version += was_there
        return was_there

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        return self._table.list_keys()

    async def restore_keys(self, generation: str, keys: Mapping[str, TenantRecord]) -> None:
        """From a copy's mirror, into a table that has lost them. Those it has stay as they are."""
        if generation != self._generation:
            return
        known = self._table.list_keys()
        for key_hash, record in keys.items():
            if key_hash not in known:
                self._table.write_key(key_hash, record)
                self._version += 1

    async def publish(self, batch: bytes) -> None:
        self._batches.append(batch)
        self._num_bytes += len(batch)
        self._cursor += 1
        while len(self._batches) > MAX_BATCHES or self._num_bytes > MAX_BATCH_BYTES:
            self._num_bytes -= len(self._batches.popleft())
        self._has_news.set()
        self._has_news = asyncio.Event()

    async def batches(self, cursor: int | None, timeout_s: float) -> Batches:
        """Those from `cursor` on, None being now; waits for one, for at most `timeout_s`."""
        if cursor is None or cursor > self._cursor:
            return Batches(self._cursor, ())
        if cursor == self._cursor:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._has_news.wait()
            except TimeoutError:
                pass
        missed = min(self._cursor - cursor, len(self._batches))
        news = list(self._batches)[len(self._batches) - missed :] if missed else []
        return Batches(self._cursor, news)
