"""Pools that hold less than what is asked of them."""

from __future__ import annotations

import pytest

from baton.core.worker_info import Role
from cluster import Cluster

pytestmark = pytest.mark.chaos
BLOCK_BYTES = 512 << 10


async def start(start_cluster, *, prefill_blocks: int, decode_blocks: int) -> Cluster:
    cluster = await start_cluster(0, 0, router=("health.required_roles=decode",))
    cluster.add(Role.PREFILL, f"engine.kv_cache_bytes={prefill_blocks * BLOCK_BYTES}")
    cluster.add(Role.DECODE, f"engine.kv_cache_bytes={decode_blocks * BLOCK_BYTES}")
    await cluster.ready()
    return cluster


@pytest.mark.parametrize(("prefill_blocks", "decode_blocks"), [(300, 60), (60, 300), (60, 60)])
async def test_more_prompts_than_blocks_take_turns(
    start_cluster, traffic_to, prefill_blocks, decode_blocks
) -> None:
    cluster = await start(start_cluster, prefill_blocks=prefill_blocks, decode_blocks=decode_blocks)
    traffic = traffic_to(cluster, seed=5)
    # 26 blocks each: two fit at a time.
    await traffic.run(traffic.asks(8, prompt_tokens=380, max_tokens=30))
    await cluster.calm()


@pytest.mark.parametrize(("prefill_blocks", "decode_blocks"), [(300, 40), (40, 300)])
async def test_prompt_larger_than_a_pool_ends_in_an_answer(
    start_cluster, traffic_to, prefill_blocks, decode_blocks
) -> None:
    cluster = await start(start_cluster, prefill_blocks=prefill_blocks, decode_blocks=decode_blocks)
    traffic = traffic_to(cluster, seed=6)
    # 65 blocks.
    asks = traffic.asks(2, prompt_tokens=1000, max_tokens=30)
    await traffic.finish(asks, traffic.send(asks), may_fail=True)
    await traffic.run(traffic.asks(2, prompt_tokens=300, max_tokens=30))
    await cluster.calm()
