"""The table that router copies of one Ray application share, inside an actor.

A class without Ray: `ray_store` makes the actor of it. The actor may be restarted with nothing, so
whatever matters can be told again: signs of life bring the slots of running requests, and every
copy mirrors the keys, revoked ones too, and merges them into a table of another generation. A
change of keys wakes the copies that wait for placements, so mirrors are behind by one message.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from services.router.shared.key_book import KeyBook, KeyState
from services.router.shared.ledger import LedgerAnswer
from services.router.shared.state import TenantRecord
from services.router.shared.store import Beat, Refund, Take
from services.router.shared.table import SharedTable

MAX_BATCHES = 1024
MAX_BATCH_BYTES = 32 << 20
"""Of placements kept for copies that ask late; the oldest go first."""


class KeysKnown(NamedTuple):
    """What a copy mirrors."""

    generation: str
    """Of the table: another one has forgotten everything."""
    version: int


NO_KEYS_KNOWN = KeysKnown("", -1)


class KeyNews(NamedTuple):
    now: KeysKnown
    states: Mapping[str, KeyState] | None
    """All keys, where the caller knows others."""


class Pulse(NamedTuple):
    """The answer to a sign of life."""

    num_copies: int
    keys: KeyNews


class Batches(NamedTuple):
    cursor: int
    batches: Sequence[bytes]
    keys: KeysKnown


class RayTable:
    """Called by several copies at once, on one event loop."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._table = SharedTable()
        self._generation = secrets.token_hex(8)
        self._batches: deque[bytes] = deque()
        self._num_bytes = 0
        self._cursor = 0
        """Number of the next batch."""
        self._has_news = asyncio.Event()

    async def take(self, take: Take) -> LedgerAnswer:
        return self._table.take(take, self._now())

    async def refund(self, refunds: Sequence[Refund]) -> None:
        self._table.refund(refunds, self._now())

    async def beat(self, beat: Beat, known: KeysKnown) -> Pulse:
        num_copies = self._table.beat(beat, self._now())
        return Pulse(num_copies, self._key_news(known))

    async def leave(self, copy_id: str) -> int:
        """The copies that remain."""
        return self._table.leave(copy_id, self._now())

    async def read_key(self, key_hash: str) -> TenantRecord | None:
        return self._keys.read(key_hash)

    async def write_key(self, key_hash: str, record: TenantRecord) -> KeyState:
        state = self._keys.write(key_hash, record)
        self._wake()
        return state

    async def revoke_key(self, key_hash: str) -> KeyState | None:
        """None where there is no such key."""
        state = self._keys.revoke(key_hash)
        self._wake()
        return state

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        return self._keys.live()

    async def read_keys(self, known: KeysKnown) -> KeyNews:
        return self._key_news(known)

    async def restore_keys(self, generation: str, states: Mapping[str, KeyState]) -> None:
        """From a copy's mirror, into a table that has lost them. Copies may come in any order."""
        if generation == self._generation:
            self._keys.merge(states)
            self._wake()

    async def publish(self, batch: bytes) -> None:
        self._batches.append(batch)
        self._num_bytes += len(batch)
        self._cursor += 1
        while len(self._batches) > MAX_BATCHES or self._num_bytes > MAX_BATCH_BYTES:
            self._num_bytes -= len(self._batches.popleft())
        self._wake()

    async def batches(self, cursor: int | None, known: KeysKnown, timeout_s: float) -> Batches:
        """Those from `cursor` on, None being now; waits for one, or for keys other than those
        `known`, for at most `timeout_s`."""
        if cursor is None or cursor > self._cursor:
            return self._batches_from(self._cursor)
        if cursor == self._cursor and known == self._keys_known:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._has_news.wait()
            except TimeoutError:
                pass
        return self._batches_from(cursor)

    def _batches_from(self, cursor: int) -> Batches:
        missed = min(self._cursor - cursor, len(self._batches))
        news = list(self._batches)[len(self._batches) - missed :] if missed else ()
        return Batches(self._cursor, news, self._keys_known)

    def _key_news(self, known: KeysKnown) -> KeyNews:
        now = self._keys_known
        return KeyNews(now, None if known == now else self._keys.states())

    @property
    def _keys(self) -> KeyBook:
        return self._table.keys

    @property
    def _keys_known(self) -> KeysKnown:
        return KeysKnown(self._generation, self._keys.version)

    def _wake(self) -> None:
        self._has_news.set()
        self._has_news = asyncio.Event()
