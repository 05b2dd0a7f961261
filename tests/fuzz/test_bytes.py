"""Bytes that are nearly requests, over HTTP and gRPC, for FUZZ_SECONDS each."""

from __future__ import annotations

import random

import grpc
import pytest

import fuzz_grpc
import fuzz_http
import fuzzing

pytestmark = [pytest.mark.fuzz, pytest.mark.timeout(0)]

HOST = "127.0.0.1"
WARM_UP_S = 20.0
NUM_AT_A_TIME = 24
"""Most wait for an answer that a request cut short does not get."""


async def fuzz(campaign, fuzzed, case):
    """A short while warms up caches, which are no leak."""
    print(f"\nFUZZ_SEED={campaign.seed} FUZZ_SECONDS={campaign.seconds:g}")
    if campaign.only is None:
        warm_up_s = min(WARM_UP_S, campaign.seconds / 4)
        warm_up = fuzzing.Campaign(campaign.seed ^ 1, warm_up_s)
        warming = await fuzzing.run(warm_up, case)
        assert not warming.complaints, "\n".join(warming.complaints)
        fuzzed.note()
    outcome = await fuzzing.run(campaign, case, canary=fuzzed.canary, num_at_a_time=NUM_AT_A_TIME)
    print(f"{outcome.num_cases} cases")
    assert not outcome.complaints, "\n".join(outcome.complaints)


async def test_nearly_http(fuzzed, campaign):
    port = fuzzed.system.http_port

    async def case(number: int, rng: random.Random) -> str | None:
        data = fuzz_http.draw(rng)
        return fuzz_http.wrong(await fuzz_http.exchange(HOST, port, data, rng), data)

    await fuzz(campaign, fuzzed, case)


async def test_nearly_grpc(fuzzed, campaign):
    port = fuzzed.system.grpc_port
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:

        async def case(number: int, rng: random.Random) -> str | None:
            if rng.random() < 0.2:
                data, wait_s = fuzz_grpc.connection_bytes(rng), rng.choice((0.0, 0.05, 0.3))
                await fuzz_grpc.send_bytes(HOST, port, data, wait_s=wait_s)
                return None
            drawn = fuzz_grpc.draw(rng)
            return fuzz_grpc.wrong(*await fuzz_grpc.call(channel, drawn), drawn)

        await fuzz(campaign, fuzzed, case)
