"""Clients leave at every moment of a request's life."""

from __future__ import annotations

import asyncio

import pytest

pytestmark = pytest.mark.chaos
NUM_CANCELLED = 40


@pytest.mark.parametrize("transport", ["shm", "nixl", "socket"])
async def test_cancelled_at_any_time(start_cluster, traffic_to, transport) -> None:
    cluster = await start_cluster(1, 2, transport=transport)
    traffic = traffic_to(cluster, seed=4)
    asks = traffic.asks(8, prompt_tokens=600, max_tokens=30)
    answers = await traffic.run(asks)
    longest_s = max(answer.seconds for answer in answers)
    for start in range(0, NUM_CANCELLED, 8):
        staying = traffic.asks(2, prompt_tokens=600, max_tokens=30)
        sent = traffic.send(staying)
        leaving = traffic.asks(8, prompt_tokens=600, max_tokens=30)
        left = await asyncio.gather(
            *(
                cluster.generate(
                    ask.prompt,
                    ask.max_tokens,
                    cancel_after_s=traffic.rng.uniform(0, longest_s) if start else 0.0,
                )
                for ask in leaving
            )
        )
        for ask, answer in zip(leaving, left, strict=True):
            traffic.check(ask, answer, may_fail=True)
        await traffic.finish(staying, sent)
    await cluster.calm()
