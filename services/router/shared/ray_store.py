"""Shared state in a named Ray actor, for the copies of a router on Ray where there is no Redis.

The first copy makes the actor, the last one to leave ends it. It is detached, so that it outlives
the copy that made it, and Ray starts it anew when it dies; a copy that finds none makes one. Calls
time out on our side, since Ray itself waits for an actor to come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from baton.core.errors import BatonError, Unavailable
from services.router.shared.deadline import within
from services.router.shared.key_book import KeyBook, KeyState
from services.router.shared.ledger import LedgerAnswer
from services.router.shared.ray_table import NO_KEYS_KNOWN, Batches, KeyNews, Pulse, RayTable
from services.router.shared.state import TenantRecord
from services.router.shared.store import Beat, Refund, Take

NAMESPACE = "baton"
CALL_TIMEOUT_S = 1.0
FIND_TIMEOUT_S = 10.0
"""Ray asks its control store, and may have to start a process."""
POLL_S = 5.0
"""How long the actor holds a question for placements."""
MAX_CONCURRENCY = 1000
"""Waiting questions for placements count as running calls."""


class RayStore:
    """A `Store`; see there. Ray is initialised already, as it is in every replica."""

    def __init__(self, deployment: str) -> None:
        self._name = f"shared-state-{deployment}"
        self._actor: Any = None
        self._finding: asyncio.Task[Any] | None = None
        self._known = NO_KEYS_KNOWN
        self._mirror = KeyBook()

    async def take(self, take: Take) -> LedgerAnswer:
        answer: LedgerAnswer = await self._call("taking quota", "take", take)
        return answer

    async def refund(self, refunds: Sequence[Refund]) -> None:
        await self._call("giving quota back", "refund", list(refunds))

    async def beat(self, beat: Beat) -> int:
        what = "the sign of life of this router"
        if self._actor is None:
            await self._find()
        pulse: Pulse = await self._call(what, "beat", beat, self._known)
        await self._take_keys(pulse.keys)
        return pulse.num_copies

    async def leave(self, copy_id: str) -> None:
        num_left: int = await self._call("leaving", "leave", copy_id)
        if num_left == 0:
            ray.kill(self._actor)

    async def read_key(self, key_hash: str) -> TenantRecord | None:
        record: TenantRecord | None = await self._call("reading a key", "read_key", key_hash)
        return record

    async def write_key(self, key_hash: str, record: TenantRecord) -> None:
        state: KeyState = await self._call("storing a key", "write_key", key_hash, record)
        self._mirror.merge({key_hash: state})

    async def delete_key(self, key_hash: str) -> bool:
        state: KeyState | None = await self._call("removing a key", "revoke_key", key_hash)
        if state is None:
            return False
        self._mirror.merge({key_hash: state})
        return True

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        keys: Mapping[str, TenantRecord] = await self._call("listing keys", "list_keys")
        return keys

    async def publish(self, batch: bytes) -> None:
        await self._call("telling placements", "publish", batch)

    async def batches(self) -> AsyncIterator[bytes]:
        what = "listening for placements"
        cursor: int | None = None
        while True:
            answer: Batches = await self._call(
                what, "batches", cursor, self._known, POLL_S, timeout_s=POLL_S + CALL_TIMEOUT_S
            )
            cursor = answer.cursor
            if answer.keys != self._known:
                await self._take_keys(await self._call(what, "read_keys", self._known))
            for batch in answer.batches:
                yield batch

    async def close(self) -> None:
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.gather(self._finding, return_exceptions=True)
        self._actor = None

    async def _take_keys(self, news: KeyNews) -> None:
        """Mirror them; a table that has lost them gets what is mirrored here."""
        if news.states is None:
            return
        has_forgotten = news.now.generation != self._known.generation and len(self._mirror)
        self._mirror.merge(news.states)
        if has_forgotten:
            states = self._mirror.states()
            await self._call("restoring keys", "restore_keys", news.now.generation, states)
        self._known = news.now

    async def _find(self) -> None:
        """Takes seconds now and then, beyond what a call may; the next call finds the result."""
        if self._finding is None or (self._finding.done() and self._actor is None):
            self._finding = asyncio.create_task(self._find_or_make(), name="shared state actor")
        async with within(CALL_TIMEOUT_S, "finding the shared actor"):
            await asyncio.shield(self._finding)

    async def _find_or_make(self) -> None:
        # Ray's own call waits for its control store.
        async with within(FIND_TIMEOUT_S, "finding the shared actor"):
            self._actor = await asyncio.to_thread(_get_or_create, self._name)

    async def _call(
        self, what: str, method: str, *args: object, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        actor = self._actor
        if actor is None:
            raise Unavailable(f"{what}: the shared actor is not found yet")
        try:
            async with within(timeout_s, what):
                return await getattr(actor, method).remote(*args)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, BatonError):
                raise cause from None
            # Dead or gone; the next sign of life looks for another.
            self._forget(actor)
            raise Unavailable(f"{what}: the shared actor fails ({type(error).__name__})") from error

    def _forget(self, actor: Any) -> None:
        if self._actor is actor:
            self._actor = None


def _get_or_create(name: str) -> Any:
    return (
        ray.remote(RayTable)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=MAX_CONCURRENCY,
        )
        .remote()
    )
