"""Shared state in Redis.

Keys, all below `baton:<format>:<deployment>:` and all but those of API keys with a time to live:
    quota:<tenant>   hash          levels of the two buckets and when they held
    slots:<tenant>   sorted set    concurrency slots by the end of their lease
    copies           sorted set    live routers by the end of their lease
    key:<sha-256>    string        who holds an API key, as JSON
    placements       channel       batches of placements

Not for Redis Cluster: scripts touch the keys of several tenants.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from redis.exceptions import ResponseError

from baton.core.errors import Unavailable
from baton.registry.redis_connection import key_prefix, open_redis, redis_errors
from baton.registry.redis_pump import RedisPump
from services.router.shared import redis_scripts as scripts
from services.router.shared.ledger import SLOT_RETRY_S, LedgerAnswer
from services.router.shared.state import QuotaKind, QuotaLimits, TenantRecord
from services.router.shared.store import Beat, GarbageValue, HeldSlot, OnGarbage, Refund, Take
from services.router.shared.wire import MAX_RECORD_BYTES, record_from_json, record_to_json

SLOTS_PER_CALL = 500
KEYS_PER_CALL = 500
MAX_LISTED_KEYS = 100_000
QUIET_S = 5.0
"""After so long without a message the listener asks whether its connection still stands."""
NO_LIMIT = -1


class RedisStore:
    """A `Store`; see there."""

    def __init__(self, url: str, *, deployment: str, on_garbage: OnGarbage) -> None:
        self._client = open_redis(url)
        # What requests wait for never stands behind what they do not.
        self._requests = RedisPump(self._client)
        self._others = RedisPump(self._client)
        self._prefix = key_prefix(deployment)
        self._channel = f"{self._prefix}placements"
        self._on_garbage = on_garbage

    async def take(self, take: Take, *, now_s: float = 0.0) -> LedgerAnswer:
        """`now_s`: for tests; 0 takes the time of Redis. As in the calls below."""
        with redis_errors("taking quota"):
            reply = await self._requests.run(
                "taking quota",
                scripts.TAKE,
                [self._ledger_key(take.tenant), self._slots_key(take.tenant)],
                [
                    repr(now_s),
                    *_rates(take.limits),
                    _limit(take.limits.max_concurrent),
                    take.num_requests,
                    take.num_tokens,
                    take.slot,
                    repr(take.slot_ttl_s),
                    repr(SLOT_RETRY_S),
                ],
            )
        granted, wait, exceeded, requests, tokens, garbage = reply
        self._report("quota", garbage)
        return LedgerAnswer(
            bool(granted),
            float(wait),
            QuotaKind(exceeded.decode()) if exceeded else None,
            float(requests) if requests else None,
            float(tokens) if tokens else None,
        )

    async def refund(self, refunds: Sequence[Refund], *, now_s: float = 0.0) -> None:
        keys: list[str] = []
        args: list[Any] = [repr(now_s)]
        for refund in refunds:
            keys += [self._ledger_key(refund.tenant), self._slots_key(refund.tenant)]
            args += [
                *_rates(refund.limits),
                refund.num_requests,
                refund.num_tokens,
                refund.slot,
                "1" if refund.only_if_held else "0",
            ]
        what = "giving quota back"
        with redis_errors(what):
            self._report("quota", await self._others.run(what, scripts.REFUND, keys, args))

    async def beat(self, beat: Beat, *, now_s: float = 0.0) -> int:
        what = "the sign of life of this router"
        with redis_errors(what):
            num_copies, garbage = await self._others.run(
                what,
                scripts.BEAT,
                [self._copies_key],
                [repr(now_s), beat.copy_id, repr(beat.copy_ttl_s)],
            )
            self._report("copies", garbage)
            for start in range(0, len(beat.slots), SLOTS_PER_CALL):
                slots = beat.slots[start : start + SLOTS_PER_CALL]
                await self._renew_slots(slots, beat.slot_ttl_s, now_s)
        return int(num_copies)

    async def leave(self, copy_id: str) -> None:
        with redis_errors("leaving"):
            await self._others.call("leaving", "ZREM", self._copies_key, copy_id)

    async def read_key(self, key_hash: str) -> TenantRecord | None:
        with redis_errors("reading a key"):
            try:
                # One byte more than allowed: of a larger value no more is fetched.
                data = await self._requests.call(
                    "reading a key", "GETRANGE", self._key(key_hash), 0, MAX_RECORD_BYTES
                )
            except ResponseError as error:
                raise GarbageValue(f"record of key {key_hash[:8]}...: {error}") from error
        return _parse_record(key_hash, data) if data else None

    async def write_key(self, key_hash: str, record: TenantRecord) -> None:
        with redis_errors("storing a key"):
            await self._others.call(
                "storing a key", "SET", self._key(key_hash), record_to_json(record)
            )

    async def delete_key(self, key_hash: str) -> bool:
        with redis_errors("removing a key"):
            return bool(await self._others.call("removing a key", "DEL", self._key(key_hash)))

    async def list_keys(self) -> Mapping[str, TenantRecord]:
        """Raises Unavailable beyond `MAX_LISTED_KEYS`."""
        found: dict[str, TenantRecord] = {}
        hashes: list[str] = []
        prefix = self._key("")
        with redis_errors("listing keys"):
            async for name in self._client.scan_iter(f"{prefix}*", count=KEYS_PER_CALL):
                hashes.append(name.decode(errors="replace").removeprefix(prefix))
                if len(hashes) > MAX_LISTED_KEYS:
                    raise Unavailable(f"more than {MAX_LISTED_KEYS} keys are stored")
        for key_hash in hashes:
            try:
                record = await self.read_key(key_hash)
            except GarbageValue as error:
                self._on_garbage("key", str(error))
                continue
            if record is not None:
                found[key_hash] = record
        return found

    async def publish(self, batch: bytes) -> None:
        with redis_errors("telling placements"):
            await self._others.call("telling placements", "PUBLISH", self._channel, batch)

    async def batches(self) -> AsyncIterator[bytes]:
        with redis_errors("listening for placements"):
            async with self._client.pubsub() as pubsub:
                await pubsub.subscribe(self._channel)
                is_asked = False
                while True:
                    message = await pubsub.get_message(timeout=QUIET_S)
                    if message is not None:
                        is_asked = False
                        if message["type"] == "message":
                            yield message["data"]
                    elif is_asked:
                        raise Unavailable("listening for placements: the connection is dead")
                    else:
                        await pubsub.ping()
                        is_asked = True

    async def close(self) -> None:
        await asyncio.gather(self._requests.close(), self._others.close())
        await self._client.aclose()

    async def _renew_slots(
        self, slots: Sequence[HeldSlot], slot_ttl_s: float, now_s: float
    ) -> None:
        tenants = list(dict.fromkeys(held.tenant for held in slots))
        number_of = {tenant: i + 1 for i, tenant in enumerate(tenants)}
        args: list[Any] = [repr(now_s), repr(slot_ttl_s)]
        for held in slots:
            args += [number_of[held.tenant], held.slot]
        keys = [self._slots_key(tenant) for tenant in tenants]
        garbage = await self._others.run("renewing slots", scripts.RENEW, keys, args)
        self._report("quota", garbage)

    def _report(self, kind: str, garbage: bytes) -> None:
        if garbage:
            self._on_garbage(kind, garbage[:300].decode(errors="replace"))

    @property
    def _copies_key(self) -> str:
        return f"{self._prefix}copies"

    def _ledger_key(self, tenant: str) -> str:
        return f"{self._prefix}quota:{quote(tenant, safe='')}"

    def _slots_key(self, tenant: str) -> str:
        return f"{self._prefix}slots:{quote(tenant, safe='')}"

    def _key(self, key_hash: str) -> str:
        return f"{self._prefix}key:{key_hash}"


def _parse_record(key_hash: str, data: bytes) -> TenantRecord:
    try:
        return record_from_json(data)
    except ValueError as error:
        raise GarbageValue(f"record of key {key_hash[:8]}...: {error}") from error


def _rates(limits: QuotaLimits) -> tuple[int, int]:
    return _limit(limits.requests_per_minute), _limit(limits.tokens_per_minute)


def _limit(limit: int | None) -> int:
    return NO_LIMIT if limit is None else limit
