"""A worker stays registered while it serves, whatever the registry does."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from baton.core.clock import MonotonicClock
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.registry.redis_registry import RedisRegistry
from baton.registry.registration import info_from_values, info_to_values
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
    keeping = asyncio.create_task(keep_registered(registry, lambda: INFO, ttl_s=1.0))

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


async def test_a_worker_is_registered_anew_once_it_has_another_role(tmp_path: Path) -> None:
    registry = DirectoryRegistry(tmp_path / "registry", clock=MonotonicClock())
    said = [INFO]
    keeping = asyncio.create_task(keep_registered(registry, lambda: said[-1], ttl_s=0.8))
    listed: list[WorkerInfo] = []
    async with asyncio.timeout(DEADLINE_S):
        while not listed:
            listed = list((await registry.list()).values())
            await asyncio.sleep(0.02)
        assert listed == said
        said.append(dataclasses.replace(INFO, role=Role.DECODE, role_version=2))
        while list((await registry.list()).values()) != said[-1:]:
            await asyncio.sleep(0.02)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert not await registry.list()


def test_readers_of_the_last_release_know_all_keys_until_a_role_changes() -> None:
    assert "role_version" not in info_to_values(INFO)
    changed = dataclasses.replace(INFO, role_version=2)
    assert info_from_values(info_to_values(changed)) == changed
    assert info_from_values(info_to_values(INFO)) == INFO


async def test_a_worker_leaves_in_time_when_redis_is_away(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    registry = RedisRegistry(server.url, deployment="test")
    keeping = asyncio.create_task(keep_registered(registry, lambda: INFO, ttl_s=1.0))
    await asyncio.sleep(0.3)
    server.kill()
    keeping.cancel()
    async with asyncio.timeout(DEADLINE_S):
        (result,) = await asyncio.gather(keeping, return_exceptions=True)
    assert isinstance(result, asyncio.CancelledError)
