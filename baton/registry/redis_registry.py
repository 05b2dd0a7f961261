"""A registry in Redis, for workers and routers of one or many hosts.

Keys, below `baton:<format>:<deployment>:workers:`, all with a time to live:
    info        hash        worker id -> registration, as JSON
    lease       sorted set  worker id by the end of its lease, in seconds of Redis' own clock
    past:<id>   sorted set  epochs of a worker that a newer one has replaced, by when to forget them
    version     string      changes with every change
    generation  string      random, made when it is missing: a Redis without data has another
and the channel `changed`. Readers wait for its messages and look at `version` anyway every
`POLL_S`, so that ended leases and lost messages show as well.

Registrations that cannot be read are left out, reported once each, and do not hide the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import NamedTuple

from redis.exceptions import RedisError

from baton.core.clock import Clock, MonotonicClock
from baton.core.errors import BatonError, ConfigError, Unavailable
from baton.core.worker_info import Epoch, WorkerId, WorkerInfo
from baton.registry import redis_registry_scripts as scripts
from baton.registry.redis_connection import key_prefix, open_redis, redis_errors
from baton.registry.redis_pump import RedisPump
from baton.registry.registration import (
    FORMAT,
    check_worker_id,
    info_from_values,
    info_to_values,
    registration_values,
)
from baton.registry.registry import Snapshot
from baton.registry.registry_view import RegistryView

logger = logging.getLogger(__name__)

POLL_S = 0.5
RETRY_MIN_S = 0.2
RETRY_MAX_S = 2.0
HOLD_S = 15.0
"""Three times the usual time to live: workers renew four times in one, and connect anew."""
MAX_INFO_BYTES = 64 << 10
MAX_REPORTED = 256

OnGarbage = Callable[[str], None]
"""Gets the reason each time a registration is refused."""


class _Reply(NamedTuple):
    generation: bytes
    version: bytes
    workers: Snapshot | None
    """None: nothing has changed since the version that was asked about."""


class RedisRegistry:
    """A `Registry`. Used on one event loop; `close` it."""

    def __init__(
        self,
        url: str,
        *,
        deployment: str,
        on_garbage: OnGarbage = lambda reason: None,
        clock: Clock | None = None,
    ) -> None:
        self._client = open_redis(url)
        self._pump = RedisPump(self._client)
        prefix = f"{key_prefix(deployment)}workers:"
        self._prefix = prefix
        self._keys = [prefix + name for name in ("info", "lease", "version", "generation")]
        self._channel = f"{prefix}changed"
        self._on_garbage = on_garbage
        self._clock = clock or MonotonicClock()
        self._view = RegistryView(HOLD_S)
        self._reported: set[str] = set()

    async def register(self, info: WorkerInfo, *, ttl_s: float) -> None:
        """Raises Unavailable also when a newer process of the same id is registered."""
        if ttl_s <= 0:
            raise ConfigError(f"a registration's time to live must be positive, got {ttl_s} s")
        check_worker_id(info.worker_id)
        data = json.dumps({"format": FORMAT, "info": info_to_values(info)})
        if len(data) > MAX_INFO_BYTES:
            raise ConfigError(
                f"the description of {info.worker_id} has {len(data)} bytes, "
                f"{MAX_INFO_BYTES} at most"
            )
        what = "registering a worker"
        with redis_errors(what):
            newer = await self._pump.run(
                what,
                scripts.REGISTER,
                [*self._keys, f"{self._prefix}past:{info.worker_id}"],
                [self._channel, info.worker_id, info.epoch, data, repr(ttl_s)],
            )
        if newer:
            raise Unavailable(
                f"worker id {info.worker_id} belongs to a process that was started later; end one "
                "of the two, or give them different ids"
            )

    async def renew(self, worker_id: WorkerId, epoch: Epoch) -> bool:
        what = "renewing a registration"
        with redis_errors(what):
            args = [worker_id, epoch]
            return bool(await self._pump.run(what, scripts.RENEW, self._keys, args))

    async def deregister(self, worker_id: WorkerId, epoch: Epoch) -> None:
        what = "leaving the registry"
        with redis_errors(what):
            args = [self._channel, worker_id, epoch]
            await self._pump.run(what, scripts.DEREGISTER, self._keys, args)

    async def list(self) -> Snapshot:
        """Raises Unavailable. Workers from before an interruption stay a while, see
        `RegistryView`."""
        try:
            reply = await self._read(b"")
        except Unavailable:
            self._view.failed()
            raise
        assert reply.workers is not None
        return self._view.update(reply.generation, reply.workers, self._clock.now())

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        """Never raises Unavailable: while Redis is away nothing changes."""
        changed = asyncio.Event()
        listening = asyncio.create_task(self._listen(changed), name="registry messages")
        try:
            async for snapshot in self._follow(changed):
                yield snapshot
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def close(self) -> None:
        await self._pump.close()
        await self._client.aclose()

    async def _follow(self, changed: asyncio.Event) -> AsyncIterator[Snapshot]:
        view = RegistryView(HOLD_S)
        version = b""
        found: dict[WorkerId, WorkerInfo] = {}
        last: Snapshot | None = None
        retry_s = RETRY_MIN_S
        while True:
            changed.clear()
            try:
                reply = await self._read(version)
            except Unavailable as error:
                if retry_s == RETRY_MIN_S:
                    logger.warning("the registry is away, its last workers stay: %s", error)
                view.failed()
                await asyncio.sleep(retry_s)
                retry_s = min(RETRY_MAX_S, 2 * retry_s)
                continue
            if retry_s > RETRY_MIN_S:
                logger.info("the registry answers again")
                retry_s = RETRY_MIN_S
            version = reply.version
            found = found if reply.workers is None else dict(reply.workers)
            # Also without a change: what is held must go in the end.
            current = view.update(reply.generation, found, self._clock.now())
            if current != last:
                last = current
                yield current
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await changed.wait()

    async def _read(self, known_version: bytes) -> _Reply:
        what = "reading the registry"
        with redis_errors(what):
            reply = await self._pump.run(
                what, scripts.LIST, self._keys, [self._channel, known_version]
            )
        generation, version, garbage, is_unchanged, *pairs = reply
        if garbage:
            self._refuse(garbage.decode(errors="replace")[:300])
        workers = None if is_unchanged else self._parse(pairs)
        return _Reply(generation, version, workers)

    def _parse(self, pairs: Sequence[bytes]) -> Snapshot:
        workers: dict[WorkerId, WorkerInfo] = {}
        for name, data in zip(pairs[::2], pairs[1::2], strict=True):
            try:
                worker_id = WorkerId(name.decode())
                workers[worker_id] = _parse_registration(worker_id, data)
            except (ValueError, TypeError, KeyError, BatonError) as error:
                self._refuse(f"registration of {name[:60]!r}: {error}")
        return workers

    def _refuse(self, reason: str) -> None:
        self._on_garbage(reason)
        if reason not in self._reported and len(self._reported) < MAX_REPORTED:
            self._reported.add(reason)
            logger.warning("refused a value in the registry: %s", reason)

    async def _listen(self, changed: asyncio.Event) -> None:
        """Only makes `watch` faster: whatever goes wrong here, the polling finds out."""
        while True:
            with contextlib.suppress(RedisError, OSError, EOFError):
                async with self._client.pubsub(ignore_subscribe_messages=True) as pubsub:
                    await pubsub.subscribe(self._channel)
                    while True:
                        if await pubsub.get_message(timeout=RETRY_MAX_S) is not None:
                            changed.set()
            await asyncio.sleep(RETRY_MAX_S)


def _parse_registration(worker_id: WorkerId, data: bytes) -> WorkerInfo:
    if len(data) > MAX_INFO_BYTES:
        raise ValueError(f"{len(data)} bytes, {MAX_INFO_BYTES} at most")
    info = info_from_values(registration_values(data).get("info"))
    if info.worker_id != worker_id:
        raise ValueError(f"it names {info.worker_id!r}")
    return info
