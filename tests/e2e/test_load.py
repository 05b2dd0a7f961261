"""Mixed load with random cancels: every request ends, nothing leaks on any worker."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from running_system import RunningSystem

pytestmark = [pytest.mark.model, pytest.mark.slow]

NUM_REQUESTS = 500
CONCURRENCY = 16
REQUEST_TIMEOUT_S = 180.0
WORDS = ("lighthouse", "river", "Zürich", "東京", "a small dog", "7", "stars", "bread")


@pytest.fixture(scope="module")
def crowded(start_system: Callable[..., RunningSystem]) -> RunningSystem:
    """Pools of 1,088 tokens: the longest prompts fill them, so others wait or are preempted."""
    small = str(24 << 20)
    return start_system(
        "--no-ray",
        *("--set", f"prefill.engine.kv_cache_bytes={small}"),
        *("--set", f"decode.engine.kv_cache_bytes={small}"),
    )


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """(route, body); about one in twenty is refused."""
    body: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 8, 24, 60)),
        "temperature": rng.choice((0, 0.8)),
        "stream": rng.random() < 0.7,
        "seed": rng.randrange(1000),
        "ignore_eos": True,
        "n": rng.choice((1, 1, 1, 2)),
    }
    if rng.random() < 0.05:
        return "/v1/completions", {**body, "prompt": [rng.choice((-1, 10**9))]}
    if rng.random() < 0.3:
        question = "Tell me about " + " ".join(rng.choice(WORDS) for _ in range(rng.randrange(40)))
        messages = [{"role": "user", "content": question}]
        return "/v1/chat/completions", {**body, "messages": messages, "logprobs": True}
    shared = list(range(500, 564)) if rng.random() < 0.3 else []
    length = rng.choice((1, 5, 30, 100, 300, 700))
    prompt = shared + [rng.randrange(100, 40000) for _ in range(length)]
    return "/v1/completions", {**body, "prompt": prompt}


async def one_request(
    client: httpx.AsyncClient, route: str, body: dict[str, Any], cancel_after: float | None
) -> str:
    """How it ended: done, refused or cancelled. Anything else fails the test."""
    is_bad = body.get("prompt") in ([-1], [10**9])
    try:
        async with asyncio.timeout(cancel_after):
            response = await client.post(route, json=body)
    except TimeoutError:
        return "cancelled"
    if is_bad:
        assert response.status_code == 400, response.text
        return "refused"
    assert response.status_code == 200, response.text
    if body["stream"]:
        assert '"error"' not in response.text
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        usage = response.json()["usage"]
        assert usage["completion_tokens"] == body["n"] * body["max_tokens"]
    return "done"


async def run_load(url: str) -> Counter[str]:
    rng = random.Random(7)
    gate = asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(
        base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False, limits=limits
    ) as client:

        async def gated(cancel_after: float | None) -> str:
            route, body = random_request(rng)
            async with gate:
                return await one_request(client, route, body, cancel_after)

        jobs = [
            gated(rng.uniform(0.0, 2.0) if rng.random() < 0.3 else None)
            for _ in range(NUM_REQUESTS)
        ]
        return Counter(await asyncio.gather(*jobs))


@pytest.mark.timeout(600)
async def test_500_mixed_requests_with_random_cancels_leak_nothing(
    crowded: RunningSystem,
) -> None:
    outcomes = await run_load(crowded.url)
    assert sum(outcomes.values()) == NUM_REQUESTS
    assert outcomes["done"] > NUM_REQUESTS // 2
    assert outcomes["cancelled"] > 0
    assert outcomes["refused"] > 0
    crowded.assert_nothing_leaked()
