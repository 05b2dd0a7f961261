"""A worker stays registered while it serves, whatever the registry does."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry.redis_registry import RedisRegistry
from redis_server import RedisServer
from services.worker.registration import keep_registered

INFO = WorkerInfo(
    worker_id=WorkerId("prefill-0"),
    epoch=Epoch("e1"),
    role=Role.PREFILL,
    address="127.0.0.1:1",
    model_name="m",
    layout=KvLayout("m", 2, 1, 4, 4, "float32"),
    num_blocks=8,
    max_model_len=64,
    max_num_seqs=4,
    transport="shm",
    pid=os.getpid(),
)
DEADLINE_S = 20.0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_worker_registers_again_after_redis_has_lost_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    registry = RedisRegistry(server.url, deployment="test")
    keeping = asyncio.create_task(keep_registered(registry, INFO, ttl_s=1.0))

    def is_listed() -> bool:
        with server.client() as client:
            return bool(client.hexists("baton:1:test:workers:info", "prefill-0"))

    try:
        await until(is_listed)
        server.kill()
        await asyncio.sleep(0.6)
        assert not keeping.done()
        server.start()
        await until(is_listed)
        # Longer than its lease.
        await asyncio.sleep(1.5)
        assert is_listed()
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        assert not is_listed()
    finally:
        server.stop()


async def test_a_worker_leaves_in_time_when_redis_is_away(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    registry = RedisRegistry(server.url, deployment="test")
    keeping = asyncio.create_task(keep_registered(registry, INFO, ttl_s=1.0))
    await asyncio.sleep(0.3)
    server.kill()
    keeping.cancel()
    async with asyncio.timeout(DEADLINE_S):
        (result,) = await asyncio.gather(keeping, return_exceptions=True)
    assert isinstance(result, asyncio.CancelledError)
