"""Admission as clients see it: real sockets in front of the real dispatcher and fake workers."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import httpx
import pytest

from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc
from services.router.admission.admission_config import AdmissionConfig
from services.router.edge.grpc_server import GrpcServer
from services.router.edge.http_app import HttpApp
from services.router.edge.http_server import HttpServer
from services.router.tenants.tenants_config import TenantConfig, TenantsConfig

BODY = {"model": "fake", "prompt": list(range(1, 101)), "max_tokens": 4, "temperature": 0}
STRICT = {"X-SLO-Class": "interactive", "X-SLO-TTFT-Ms": "500"}
BUSY_TOKENS = 30_000
"""In the queue of each worker: one and a half seconds of the speed that is assumed."""


@pytest.fixture
async def overloaded(make_cluster, config, edge_config):
    """A cluster whose workers are busy, and clients of both doors."""
    tenants = TenantsConfig(
        trust_tenant_header=True,
        named={"limited": TenantConfig(requests_per_minute=2, tokens_per_minute=10_000)},
    )
    config = dataclasses.replace(
        config, tenants=tenants, admission=AdmissionConfig(max_queued_requests=3)
    )
    cluster = await make_cluster(config=config)
    core = cluster.core
    app = HttpApp(core.dispatcher, metrics=core.metrics, config=edge_config, tenants=core.tenants)
    http = HttpServer(app, host="127.0.0.1", port=0, config=edge_config)
    rpc = GrpcServer(
        core.dispatcher, host="127.0.0.1", port=0, metrics=core.metrics, config=edge_config,
        tenants=core.tenants,
    )  # fmt: skip
    await asyncio.gather(http.start(), rpc.start())
    url = f"http://127.0.0.1:{http.port}"
    async with (
        httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{rpc.port}") as channel,
    ):
        await set_queues(cluster, BUSY_TOKENS)
        yield cluster, client, inference_pb2_grpc.InferenceStub(channel)
    await asyncio.gather(http.stop(), rpc.stop())


async def set_queues(cluster, tokens):
    for worker in cluster.workers.values():
        worker.set_load(queued_prefill_tokens=tokens)
    async with asyncio.timeout(3):
        while any(w.load.queued_prefill_tokens != tokens for w in cluster.core.pool.view().workers):
            await asyncio.sleep(0.005)


def submitted(cluster):
    return [r for worker in cluster.workers.values() for r in worker.submitted]


async def ask(client, headers=None, **fields):
    return await client.post("/v1/completions", json={**BODY, **fields}, headers=headers or {})


@pytest.mark.parametrize("stream", [False, True])
async def test_http_429_is_truthful(overloaded, stream):
    cluster, client, _ = overloaded
    answer = await ask(client, STRICT, stream=stream)
    assert answer.status_code == 429 and not submitted(cluster)
    error = answer.json()["error"]
    assert error["code"] == "rate_limit_exceeded" and "interactive" in error["message"]
    retry_after_s = int(answer.headers["retry-after-ms"]) / 1000
    assert 0.1 <= retry_after_s <= 3 and int(answer.headers["retry-after"]) >= retry_after_s
    # The work ahead is done by then.
    await set_queues(cluster, 0)
    await asyncio.sleep(retry_after_s)
    assert (await ask(client, STRICT, stream=stream)).status_code == 200
    await cluster.settled()


async def test_grpc_says_the_same(overloaded):
    cluster, _, stub = overloaded
    request = pb.CompletionRequest(
        model="fake", token_ids=pb.TokenIds(ids=BODY["prompt"]), sampling={"max_tokens": 4}
    )
    metadata = [(name.lower(), value) for name, value in STRICT.items()]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        [delta async for delta in stub.Generate(request, metadata=metadata)]
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    pushback_ms = int(dict(refused.value.trailing_metadata())["grpc-retry-pushback-ms"])
    await set_queues(cluster, 0)
    await asyncio.sleep(pushback_ms / 1000)
    deltas = [delta async for delta in stub.Generate(request, metadata=metadata)]
    assert sum(len(d.token_ids) for d in deltas) == 4
    await cluster.settled()


async def test_client_that_leaves_the_queue_makes_room_at_once(overloaded):
    cluster, client, _ = overloaded
    waiting = [asyncio.create_task(ask(client)) for _ in range(3)]
    async with asyncio.timeout(3):
        while cluster.core.gate.num_waiting < 3:
            await asyncio.sleep(0.005)
    full = await ask(client)
    assert full.status_code == 429 and "queue is full" in full.json()["error"]["message"]
    waiting[0].cancel()
    async with asyncio.timeout(3):
        while cluster.core.gate.num_waiting == 3:
            await asyncio.sleep(0.005)
    waiting.append(asyncio.create_task(ask(client)))
    async with asyncio.timeout(3):
        while cluster.core.gate.num_waiting < 3:
            await asyncio.sleep(0.005)
    await set_queues(cluster, 0)
    answers = await asyncio.gather(*waiting[1:])
    assert [a.status_code for a in answers] == [200, 200, 200]
    await cluster.settled()
    cluster.core.gate.check_integrity()


async def test_quota_of_a_tenant_over_http(overloaded):
    cluster, client, _ = overloaded
    await set_queues(cluster, 0)
    headers = {"X-Tenant-Id": "limited"}
    answers = [await ask(client, headers) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    refused = answers[-1]
    assert refused.headers["x-ratelimit-limit-requests"] == "2"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert 20 < int(refused.headers["retry-after"]) <= 30
    assert (await ask(client, {"X-Tenant-Id": "other"})).status_code == 200
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers[:2]] == ["1", "0"]
    # Every prompt and every choice counts.
    both = await ask(client, {"X-Tenant-Id": "limited-too"}, n=2)
    assert both.status_code == 200
    await cluster.settled()


async def test_metrics_name_classes_results_and_tenants(overloaded):
    cluster, client, _ = overloaded
    await ask(client, STRICT)
    await set_queues(cluster, 0)
    await ask(client, {"X-Tenant-Id": "acme"})
    text = await cluster.rendered(
        'baton_admissions_total{result="ttft",slo_class="interactive"} 1.0',
        'baton_admissions_total{result="at_once",slo_class="standard"} 1.0',
        'baton_admission_queue_requests{slo_class="batch"} 0.0',
        'baton_tenant_work_tokens_total{tenant="acme"}',
        "baton_admission_shedding 1.0",
        'baton_requests_rejected_total{status="429"} 1.0',
    )
    assert "baton_requests_running 0.0" in text


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_say_where_a_tenant_with_quotas_stands(overloaded, stream):
    cluster, client, _ = overloaded
    await set_queues(cluster, 0)
    answer = await ask(client, {"X-Tenant-Id": "limited"}, stream=stream, n=2)
    assert answer.status_code == 200
    headers = answer.headers
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert 55 < float(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert headers["x-ratelimit-limit-tokens"] == "10000"
    # Both choices, each with its prompt, as they were counted at the door.
    assert 9_790 <= int(headers["x-ratelimit-remaining-tokens"]) <= 9_810
    assert 0 < float(headers["x-ratelimit-reset-tokens"].removesuffix("s")) < 5
    unlimited = await ask(client, {"X-Tenant-Id": "other"}, stream=stream)
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]
    await cluster.settled()


async def test_trailing_metadata_says_where_a_tenant_with_quotas_stands(overloaded):
    cluster, _, stub = overloaded
    await set_queues(cluster, 0)
    request = pb.CompletionRequest(
        model="fake", token_ids=pb.TokenIds(ids=BODY["prompt"]), sampling={"max_tokens": 4}
    )
    call = stub.Generate(request, metadata=[("x-tenant-id", "limited")])
    assert [delta async for delta in call]
    trailing = dict(await call.trailing_metadata())
    assert trailing["x-ratelimit-remaining-requests"] == "1"
    assert trailing["x-ratelimit-limit-tokens"] == "10000"
    await cluster.settled()
