"""A disk tier that is corrupt, full, or gone costs time and never a token."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.core.worker_info import Role
from cluster import Cluster
from traffic import Traffic

pytestmark = pytest.mark.chaos
MIB = 1 << 20
POOL_BLOCKS = 50
"""Of 512 KiB; a prompt has 19."""
NUM_PROMPTS = 8
SAVING_S = 0.4
ASKS = {"prompt_tokens": 300, "max_tokens": 10}


async def start(start_cluster, directory: Path, disk_bytes: int = 512 * MIB) -> Cluster:
    cluster = await start_cluster(0, 0, router=("health.required_roles=decode",))
    cluster.add(
        Role.DECODE,
        f"engine.kv_cache_bytes={POOL_BLOCKS * MIB // 2}",
        f"tiers.host_bytes={24 * MIB}",
        f"tiers.disk_bytes={disk_bytes}",
        f"tiers.disk_path={directory}",
        "tiers.save_below_free_ratio=1.0",
        "tiers.retry_s=1",
        "transfer.max_fetch_share=1.0",
    )
    await cluster.ready()
    return cluster


async def fill(cluster: Cluster, traffic: Traffic) -> list:
    """More prompts than the pool and the host tier hold, one after the other."""
    asks = traffic.asks(NUM_PROMPTS, **ASKS)
    for ask in asks:
        await traffic.run([ask])
        # Saving keeps off the hot path; it gets the time that an idle moment would give it.
        await asyncio.sleep(SAVING_S)
    await cluster.calm()
    return asks


async def again(cluster: Cluster, traffic: Traffic, asks: list) -> None:
    for ask in asks:
        await traffic.run([ask])
    await cluster.calm()


async def counted(cluster: Cluster, name: str) -> bool:
    """Whether the worker has told of any; it does so once a second."""
    for _ in range(50):
        if await cluster.total(f"baton_kv_{name}_total"):
            return True
        await asyncio.sleep(0.1)
    return False


def slabs(directory: Path) -> list[Path]:
    """The files with blocks; small ones are claims and tables."""
    return [p for p in directory.rglob("*") if p.is_file() and p.stat().st_size >= MIB // 2]


def spoil(directory: Path) -> None:
    """Overwrite a stretch of every block, wherever it lies."""
    files = slabs(directory)
    assert files
    for path in files:
        with path.open("r+b") as file:
            for position in range(0, path.stat().st_size, MIB // 4):
                file.seek(position)
                file.write(os.urandom(4096))


async def test_blocks_come_back_from_disk_after_a_restart(start_cluster, traffic_to, tmp_path):
    cluster = await start(start_cluster, tmp_path / "kv")
    traffic = traffic_to(cluster, seed=12)
    asks = await fill(cluster, traffic)
    await again(cluster, traffic, asks)
    assert await counted(cluster, "restored_blocks")
    cluster.kill("decode-0")
    cluster.restart("decode-0")
    await cluster.ready()
    await again(cluster, traffic, asks)
    assert await counted(cluster, "restored_blocks")
    assert not await counted(cluster, "corrupt_blocks")


@pytest.mark.parametrize("is_restarted", [False, True], ids=["while running", "while stopped"])
async def test_corrupt_blocks_are_dropped(start_cluster, traffic_to, tmp_path, is_restarted):
    cluster = await start(start_cluster, tmp_path / "kv")
    traffic = traffic_to(cluster, seed=13)
    asks = await fill(cluster, traffic)
    if is_restarted:
        cluster.kill("decode-0")
    spoil(tmp_path / "kv")
    if is_restarted:
        cluster.restart("decode-0")
        await cluster.ready()
    await again(cluster, traffic, asks)
    if not is_restarted:
        assert await counted(cluster, "corrupt_blocks")
    await again(cluster, traffic, asks)


async def test_cut_short_files_are_survived(start_cluster, traffic_to, tmp_path):
    cluster = await start(start_cluster, tmp_path / "kv")
    traffic = traffic_to(cluster, seed=14)
    asks = await fill(cluster, traffic)
    cluster.kill("decode-0")
    for path in slabs(tmp_path / "kv"):
        os.truncate(path, path.stat().st_size // 2 + 1)
    cluster.restart("decode-0")
    await cluster.ready()
    await again(cluster, traffic, asks)
    await again(cluster, traffic, asks)


async def test_vanished_directory_is_survived(start_cluster, traffic_to, tmp_path):
    cluster = await start(start_cluster, tmp_path / "kv")
    traffic = traffic_to(cluster, seed=15)
    asks = await fill(cluster, traffic)
    shutil.rmtree(tmp_path / "kv")
    await again(cluster, traffic, asks)
    await again(cluster, traffic, traffic.asks(NUM_PROMPTS, **ASKS))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m,mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounting.returncode:
        pytest.skip(f"no file system of our own here: {mounting.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


async def test_full_disk_is_survived(start_cluster, traffic_to, small_disk):
    cluster = await start(start_cluster, small_disk)
    traffic = traffic_to(cluster, seed=16)
    asks = await fill(cluster, traffic)
    await again(cluster, traffic, asks)
    lines = cluster.log_lines("decode-0")
    assert any("the disk is full" in str(line["message"]) for line in lines)
