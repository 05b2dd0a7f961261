"""Who holds an API key: asked of the store, remembered, and answered from memory while it is away.

Requests of one client wait for one question together. The store counts as failed only by what the
caller makes of the exceptions.
"""

from __future__ import annotations

import asyncio

from baton.core.clock import Clock
from baton.core.errors import Unavailable
from services.router.shared.config import SharedConfig
from services.router.shared.deadline import STORE_TIMEOUT_S, within
from services.router.shared.key_cache import KeyCache
from services.router.shared.state import TenantRecord
from services.router.shared.store import GarbageValue, Store
from services.router.shared.telemetry import SharedTelemetry


class KeyLookup:
    """Used on one event loop, until `stop`."""

    def __init__(
        self, store: Store, *, config: SharedConfig, telemetry: SharedTelemetry, clock: Clock
    ) -> None:
        self._store = store
        self._config = config
        self._telemetry = telemetry
        self._clock = clock
        self._cache = KeyCache(config.max_cached_keys)
        self._asking: dict[str, asyncio.Task[TenantRecord | None]] = {}

    async def stop(self) -> None:
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def is_fresh(self, key_hash: str) -> bool:
        return self._remembered(key_hash, self._config.key_fresh_s) is not None

    def from_memory(self, key_hash: str) -> TenantRecord | None:
        """The last answer. Raises Unavailable, for a client's eyes, when there is none or an old
        one."""
        heard = self._remembered(key_hash, self._config.key_stale_s)
        if heard is None:
            raise Unavailable("this API key cannot be checked at the moment; try again soon")
        return heard[0]

    async def ask(self, key_hash: str) -> TenantRecord | None:
        """Ask the store. Raises TimeoutError beyond the budget, Unavailable when it fails, and
        GarbageValue when the record cannot be read."""
        async with asyncio.timeout(self._config.budget_s):
            # Shielded, as others may wait for the same.
            return await asyncio.shield(self._question(key_hash))

    def remember(self, key_hash: str, record: TenantRecord | None) -> None:
        self._cache.put(key_hash, record, self._clock.now())

    def _remembered(self, key_hash: str, max_age_s: float) -> tuple[TenantRecord | None] | None:
        answer = self._cache.get(key_hash, max_age_s=max_age_s, now_s=self._clock.now())
        return None if answer is None else (answer.record,)

    def _question(self, key_hash: str) -> asyncio.Task[TenantRecord | None]:
        task = self._asking.get(key_hash)
        if task is None:
            task = asyncio.create_task(self._read(key_hash), name="key of a client")
            self._asking[key_hash] = task
            task.add_done_callback(lambda done: self._answered(key_hash, done))
        return task

    def _answered(self, key_hash: str, task: asyncio.Task[TenantRecord | None]) -> None:
        self._asking.pop(key_hash, None)
        if not task.cancelled():
            # Retrieved here too, as nobody may be waiting any more.
            task.exception()

    async def _read(self, key_hash: str) -> TenantRecord | None:
        try:
            async with within(STORE_TIMEOUT_S, "reading a key"):
                record = await self._store.read_key(key_hash)
        except GarbageValue as error:
            self._telemetry.garbage("key", str(error))
            raise
        self.remember(key_hash, record)
        return record
