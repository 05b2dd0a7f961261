"""The first cases of a campaign of nearly right requests (see `make fuzz`), over real sockets."""

from __future__ import annotations

import asyncio
import random

import grpc

import fuzz_grpc
import fuzz_http
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc
from baton.telemetry.metrics import Metrics
from fuzzing import Campaign, run
from services.router.edge.grpc_server import GrpcServer

HOST = "127.0.0.1"
CAMPAIGN = Campaign(seed=20, seconds=60)
NUM_CASES = 250
NUM_AT_A_TIME = 32


async def test_nearly_http_is_answered_and_the_service_lives(edge, client, generator):
    async def case(number: int, rng: random.Random) -> str | None:
        data = fuzz_http.draw(rng)
        statuses = await fuzz_http.exchange(HOST, edge.port, data, rng, idle_s=0.2)
        return fuzz_http.wrong(statuses, data)

    outcome = await run(CAMPAIGN, case, max_cases=NUM_CASES, num_at_a_time=NUM_AT_A_TIME)
    assert not outcome.complaints, "\n".join(outcome.complaints)
    assert outcome.num_cases == NUM_CASES
    await generator.until_idle(len(generator.started))
    answer = await client.post("/v1/completions", json={"prompt": "a"})
    assert answer.json()["choices"][0]["text"] == "Hello, world"


async def test_nearly_grpc_is_answered_and_the_service_lives(generator, edge_config):
    server = GrpcServer(generator, host=HOST, port=0, metrics=Metrics(), config=edge_config)
    await server.start()
    async with grpc.aio.insecure_channel(f"{HOST}:{server.port}") as channel:

        async def case(number: int, rng: random.Random) -> str | None:
            if rng.random() < 0.2:
                data = fuzz_grpc.connection_bytes(rng)
                await fuzz_grpc.send_bytes(HOST, server.port, data, wait_s=0.05)
                return None
            drawn = fuzz_grpc.draw(rng)
            return fuzz_grpc.wrong(*await fuzz_grpc.call(channel, drawn), drawn)

        outcome = await run(CAMPAIGN, case, max_cases=NUM_CASES, num_at_a_time=NUM_AT_A_TIME)
        assert not outcome.complaints, "\n".join(outcome.complaints)
        stub = inference_pb2_grpc.InferenceStub(channel)
        deltas = [d async for d in stub.Generate(pb.CompletionRequest(text="a"))]
        assert "".join(d.text for d in deltas) == "Hello, world"
    await server.stop()
    await asyncio.sleep(0)
    await generator.until_idle(len(generator.started))
