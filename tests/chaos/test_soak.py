"""Minutes of conversations while workers are killed, stopped, told to leave and started again."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from baton.core.worker_info import Role
from cluster import Cluster
from traffic import Ask, Traffic

pytestmark = pytest.mark.chaos
SEED = 1
SECONDS = 300.0
QUIET_EVERY_S = 60.0
NUM_CLIENTS = 4
CANCELLED_SHARE = 0.15
MAX_FAILED_SHARE = 0.02
"""Requests that met one fault after another may run out of retries."""
MAX_NEW_FDS = 64
CONVERSATION = {"num_turns": 3, "turn_tokens": 120, "max_tokens": 40}
NUM_CONVERSATIONS = 12
MIB = 1 << 20


class Soak:
    """Clients and faults, until told to be quiet."""

    def __init__(self, cluster: Cluster, traffic: Traffic, talks: list[list[Ask]]) -> None:
        self.counts: Counter[str] = Counter()
        self._cluster = cluster
        self._traffic = traffic
        self._talks = talks
        self._rng = traffic.rng
        self._is_quiet = False

    async def run(self, seconds: float) -> None:
        """One stretch of noise; all clients have their answers and all workers run when it ends."""
        self._is_quiet = False
        clients = [
            asyncio.create_task(self._client(random.Random(self._rng.random())))
            for _ in range(NUM_CLIENTS)
        ]
        faults = asyncio.create_task(self._faults())
        await asyncio.wait([*clients, faults], timeout=seconds, return_when="FIRST_EXCEPTION")
        self._is_quiet = True
        await asyncio.gather(*clients, faults)

    async def _client(self, rng: random.Random) -> None:
        while not self._is_quiet:
            for ask in rng.choice(self._talks):
                leaves = rng.random() < CANCELLED_SHARE
                answer = await self._cluster.generate(
                    ask.prompt,
                    ask.max_tokens,
                    cancel_after_s=rng.uniform(0, 1.5) if leaves else None,
                )
                self._traffic.check(ask, answer, may_fail=True)
                kind = "complete" if answer.is_complete else "cancelled" if leaves else "failed"
                self.counts[kind] += 1
                if kind == "failed":
                    print("failed:", answer.error[:300])

    async def _faults(self) -> None:
        faults = {"kill": self._kill, "pause": self._pause, "leave": self._leave}
        while not self._is_quiet:
            await asyncio.sleep(self._rng.uniform(0.5, 4))
            name = self._rng.choice(sorted(self._cluster.workers))
            fault = self._rng.choice(sorted(faults))
            self.counts[fault] += 1
            await faults[fault](name)
            # With all workers of a pool gone requests would only wait.
            await self._cluster.ready()

    async def _kill(self, name: str) -> None:
        self._cluster.kill(name)
        await asyncio.sleep(self._rng.uniform(0, 3))
        self._cluster.restart(name)

    async def _pause(self, name: str) -> None:
        self._cluster.pause(name)
        await asyncio.sleep(self._rng.uniform(0.2, 8))
        self._cluster.resume(name)

    async def _leave(self, name: str) -> None:
        self._cluster.leave(name)
        assert await self._cluster.ended(name, 30) == 0
        self._cluster.restart(name)


async def start(start_cluster, directory: Path) -> Cluster:
    cluster = await start_cluster(0, 0, "transfer.lease_s=5")
    for number in range(5):
        cluster.add(
            Role.PREFILL if number < 2 else Role.DECODE,
            # Three conversations and the tiers hold the rest.
            f"engine.kv_cache_bytes={50 * MIB}",
            f"tiers.host_bytes={20 * MIB}",
            f"tiers.disk_bytes={100 * MIB}",
            f"tiers.disk_path={directory / 'kv'}",
            "tiers.save_below_free_ratio=1.0",
        )
    await cluster.ready()
    return cluster


@pytest.mark.timeout(900)
async def test_soak(request, start_cluster, reference, traffic_to, tmp_path) -> None:
    seed = request.config.getoption("--soak-seed", None) or SEED
    seconds = request.config.getoption("--soak-seconds", None) or SECONDS
    talks = [
        [
            Ask(prompt, CONVERSATION["max_tokens"])
            for prompt in reference.conversation(index, **CONVERSATION)
        ]
        for index in range(NUM_CONVERSATIONS)
    ]
    cluster = await start(start_cluster, tmp_path)
    soak = Soak(cluster, traffic_to(cluster, seed=seed), talks)
    router = psutil.Process(cluster.router_pid)
    num_fds = router.num_fds()
    ends_at_s = time.monotonic() + seconds
    while time.monotonic() < ends_at_s:
        await soak.run(min(QUIET_EVERY_S, ends_at_s - time.monotonic()))
        await cluster.ready()
        await cluster.calm()
    print(dict(soak.counts))
    assert soak.counts["complete"] > seconds / 2
    num_asked = soak.counts["complete"] + soak.counts["failed"]
    assert soak.counts["failed"] <= MAX_FAILED_SHARE * num_asked, soak.counts
    assert router.num_fds() < num_fds + MAX_NEW_FDS
