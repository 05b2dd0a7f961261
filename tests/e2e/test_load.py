"""Mixed load with random cancels: every request ends, nothing leaks on any worker."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from running_system import RunningSystem

pytestmark = pytest.mark.model

NUM_REQUESTS = 500
CONCURRENCY = 16
REQUEST_TIMEOUT_S = 120.0


def random_body(rng: random.Random, model: str) -> dict[str, Any]:
    length = rng.choice((1, 5, 30, 100, 300))
    shared = [500 + i for i in range(64)] if rng.random() < 0.3 else []
    return {
        "model": model,
        "prompt": shared + [rng.randrange(100, 40000) for _ in range(length)],
        "max_tokens": rng.choice((1, 2, 8, 24)),
        "temperature": rng.choice((0, 0.8)),
        "stream": rng.random() < 0.7,
        "seed": rng.randrange(1000),
        "ignore_eos": True,
    }


async def one_request(
    client: httpx.AsyncClient, body: dict[str, Any], cancel_after: float | None
) -> str:
    """How it ended: done or cancelled. Anything else fails the test."""
    try:
        async with asyncio.timeout(cancel_after):
            response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            assert '"error"' not in response.text
            if body["stream"]:
                assert response.text.endswith("data: [DONE]\n\n")
            else:
                assert response.json()["usage"]["completion_tokens"] == body["max_tokens"]
            return "done"
    except TimeoutError:
        return "cancelled"


async def run_load(url: str) -> Counter[str]:
    rng = random.Random(7)
    gate = asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(
        base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False, limits=limits
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def gated(body: dict[str, Any], cancel_after: float | None) -> str:
            async with gate:
                return await one_request(client, body, cancel_after)

        jobs = [
            gated(random_body(rng, model), rng.uniform(0.0, 1.5) if rng.random() < 0.3 else None)
            for _ in range(NUM_REQUESTS)
        ]
        return Counter(await asyncio.gather(*jobs))


async def test_500_mixed_requests_with_random_cancels_leak_nothing(system: RunningSystem) -> None:
    outcomes = await run_load(system.url)
    assert sum(outcomes.values()) == NUM_REQUESTS
    assert outcomes["done"] > NUM_REQUESTS // 2
    assert outcomes["cancelled"] > 0
    system.assert_nothing_leaked()
