"""Who sends a request, over HTTP and gRPC: keys, tenants, classes, priorities."""

from __future__ import annotations

import contextlib

import grpc
import httpx
import pytest

from baton.core.block import root_hash
from baton.core.errors import Overloaded, QuotaExceeded, RateLimit
from baton.engine.tokenizer import Tokenizer
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc
from baton.telemetry.metrics import Metrics
from services.router.admission.slo import SloTargets
from services.router.admission.slo_config import SloConfig
from services.router.edge.grpc_server import GrpcServer
from services.router.edge.http_app import HttpApp
from services.router.placement.affinity import MAX_KEY_LENGTH
from services.router.shared.process_state import ProcessState
from services.router.shared.state import QuotaLimits, TenantRecord, hash_key
from services.router.tenants.api_keys import new_key, write_keys
from services.router.tenants.quota import QuotaDesk
from services.router.tenants.tenants import open_tenants
from services.router.tenants.tenants_config import TenantConfig, TenantsConfig

KEY = new_key()
ACME = TenantRecord("acme", QuotaLimits(60, 10_000, 4), weight=2.0, slo_class="batch")
BODY = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}
CODE = grpc.StatusCode


@pytest.fixture
def keys_file(tmp_path):
    path = tmp_path / "keys.json"
    write_keys(path, {hash_key(KEY): ACME})
    return path


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def serve(generator, edge_config, metrics):
    """An HTTP client of an edge with these tenants."""

    @contextlib.asynccontextmanager
    async def serve(config, *, slo=None, shared=None):
        tenants = open_tenants(
            config, slo or SloConfig(), shared=shared or ProcessState(), metrics=metrics
        )
        app = HttpApp(generator, metrics=metrics, config=edge_config, tenants=tenants)
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
            yield client
        app.close()

    return serve


async def ask(client, headers=None, **fields):
    return await client.post("/v1/completions", json={**BODY, **fields}, headers=headers)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_without_keys_everybody_is_the_anonymous_tenant(serve, generator):
    async with serve(TenantsConfig()) as client:
        assert (await ask(client, bearer("whatever"))).status_code == 200
        assert (await ask(client, {"X-Tenant-Id": "evil"})).status_code == 200
    assert [r.tenant for r in generator.started] == ["anonymous", "anonymous"]
    assert generator.started[0].limits.is_unlimited
    assert generator.started[0].slo_class == "standard"


async def test_key_says_who_it_is_and_what_it_may(serve, generator, keys_file):
    async with serve(TenantsConfig(keys_file=keys_file)) as client:
        assert (await ask(client, bearer(KEY))).status_code == 200
        assert (await ask(client, {"authorization": f"bearer   {KEY}"})).status_code == 200
    (request, _) = generator.started
    assert (request.tenant, request.weight, request.slo_class) == ("acme", 2.0, "batch")
    assert request.limits == ACME.limits and request.priority == 10


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "missing"),
        ({"Authorization": "Basic dTpw"}, "malformed"),
        ({"Authorization": "Bearer"}, "malformed"),
        ({"Authorization": "Bearer a b"}, "malformed"),
        ({"Authorization": "Bearer " + "x" * 5000}, "malformed"),
        (bearer(KEY[:-1]), "unknown"),
        (bearer(KEY + "x"), "unknown"),
        (bearer(hash_key(KEY)), "unknown"),
    ],
)
async def test_without_a_valid_key_nothing_is_read_or_shown(
    serve, generator, keys_file, metrics, headers, reason
):
    async with serve(TenantsConfig(keys_file=keys_file)) as client:
        answer = await client.post("/v1/chat/completions", content=b"no json", headers=headers)
        models = await client.get("/v1/models", headers=headers)
        one = await client.get("/v1/models/tiny", headers=headers)
        for path in ("/tokenize", "/detokenize", "/v1/embeddings", "/reset_prefix_cache"):
            other = await client.post(path, content=b"no json", headers=headers)
            assert other.status_code == 401
        for path in ("/health", "/ping", "/version", "/load", "/metrics", "/openapi.json"):
            assert (await client.get(path, headers=headers)).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
    assert answer.status_code == models.status_code == one.status_code == 401
    error = answer.json()["error"]
    assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert KEY[:-1] not in answer.text and not generator.started
    text = metrics.render().decode()
    assert f'baton_requests_unauthorized_total{{reason="{reason}"}} 7.0' in text


async def test_keys_of_the_shared_store(serve, generator):
    shared = ProcessState()
    await shared.put_key(hash_key(KEY), ACME)
    async with serve(TenantsConfig(require_key=True), shared=shared) as client:
        assert (await ask(client, bearer(KEY))).status_code == 200
        assert (await ask(client, bearer("other"))).status_code == 401
        await shared.remove_key(hash_key(KEY))
        assert (await ask(client, bearer(KEY))).status_code == 401


async def test_settings_count_where_the_key_says_nothing(serve, generator, tmp_path):
    path = tmp_path / "keys.json"
    write_keys(path, {hash_key(KEY): TenantRecord("acme"), hash_key("b"): TenantRecord("other")})
    config = TenantsConfig(
        keys_file=path,
        default=TenantConfig(max_concurrent=3),
        named={"acme": TenantConfig(weight=5.0, tokens_per_minute=77, slo_class="interactive")},
    )
    async with serve(config) as client:
        await ask(client, bearer(KEY))
        await ask(client, bearer("b"))
    acme, other = generator.started
    assert (acme.weight, acme.slo_class) == (5.0, "interactive")
    assert acme.limits == QuotaLimits(tokens_per_minute=77)
    assert (other.weight, other.limits) == (1.0, QuotaLimits(max_concurrent=3))


async def test_tenant_header_counts_only_where_it_is_trusted(serve, generator):
    config = TenantsConfig(trust_tenant_header=True, named={"acme": TenantConfig(weight=4.0)})
    async with serve(config) as client:
        await ask(client, {"X-Tenant-Id": "acme"})
        await ask(client)
        too_long = await ask(client, {"X-Tenant-Id": "x" * 200})
    assert [(r.tenant, r.weight) for r in generator.started] == [("acme", 4.0), ("anonymous", 1.0)]
    assert too_long.status_code == 400 and "128" in too_long.text


async def test_class_and_targets_of_a_request(serve, generator):
    async with serve(TenantsConfig()) as client:
        await ask(client, {"X-SLO-Class": "Interactive"})
        await ask(client, {"X-SLO-Class": "interactive", "X-SLO-TTFT-Ms": "250"})
        await ask(client, {"X-SLO-ITL-Ms": "40"})
        unknown = await ask(client, {"X-SLO-Class": "gold"})
        wrong = await ask(client, {"X-SLO-TTFT-Ms": "soon"})
    named, own, bare = generator.started
    assert named.slo_class == "interactive" and named.targets is None
    assert own.targets == SloTargets(0.25, 0.1)
    assert bare.targets == SloTargets(None, 0.04) and bare.slo_class == "standard"
    assert unknown.status_code == wrong.status_code == 400
    assert "batch, interactive, standard" in unknown.json()["error"]["message"]
    assert unknown.json()["error"]["param"] == "X-SLO-Class"


async def test_targets_of_requests_can_be_switched_off(serve, generator):
    async with serve(TenantsConfig(), slo=SloConfig(allow_request_targets=False)) as client:
        await ask(client, {"X-SLO-TTFT-Ms": "1"})
    assert generator.started[0].targets is None


async def test_priority_of_the_body_goes_before_the_header_and_that_before_the_class(
    serve, generator
):
    async with serve(TenantsConfig()) as client:
        await ask(client, {"X-Priority": "5"}, priority=-7)
        await ask(client, {"X-Priority": "5", "X-SLO-Class": "batch"})
        await ask(client, {"X-SLO-Class": "batch"})
        answers = [
            await ask(client, priority=101),
            await ask(client, priority=10**30),
            await ask(client, {"X-Priority": "high"}),
            await ask(client, {"X-Priority": "-101"}),
        ]
    assert [r.priority for r in generator.started] == [-7, 5, 10]
    assert {a.status_code for a in answers} == {400}


async def test_conversation_is_known_by_header_or_user_and_kept_apart_by_tenant(serve, generator):
    config = TenantsConfig(trust_tenant_header=True)
    async with serve(config) as client:
        await ask(client, user="u")
        await ask(client, {"X-Session-Id": "s"}, user="u")
        await ask(client, {"X-Tenant-Id": "acme"}, user="u")
        await ask(client)
        await ask(client, user="u" * 100_000)
        await ask(client, {"X-Tenant-Id": "a" * 100}, user="u" * 200)
    keys = [r.session_key for r in generator.started]
    assert keys[3] == "" and len(set(keys)) == 6
    assert keys[1].endswith("\0s") and max(map(len, keys)) <= MAX_KEY_LENGTH


async def test_tenants_that_are_told_apart_share_no_cache_unless_allowed_to(
    serve, generator, keys_file
):
    for isolate in (False, None, True):
        config = TenantsConfig(trust_tenant_header=True, isolate_caches=isolate)
        async with serve(config) as client:
            await ask(client, {"X-Tenant-Id": "a"}, cache_salt="x")
            await ask(client, {"X-Tenant-Id": "b"}, cache_salt="x")
    salts = [r.cache_salt for r in generator.started]
    assert salts[0] == salts[1] == "x" and salts[2] != salts[3] and salts[4] != salts[5]
    assert TenantsConfig(keys_file=keys_file).isolates_caches
    assert not TenantsConfig().isolates_caches


async def test_a_salt_of_the_client_narrows_its_own_cache_alone(serve, generator):
    """No tenant reaches another's blocks, or those of its own other salt, whatever it sends."""
    tenants = ("a", "b", "ab", "anonymous", "a b")
    salts = ("", "x", "b", "\0", "b\0", "b\0x", "\0b", "anonymous\0")
    async with serve(TenantsConfig(trust_tenant_header=True)) as client:
        for tenant in tenants:
            for salt in salts:
                answer = await ask(client, {"X-Tenant-Id": tenant}, cache_salt=salt)
                assert answer.status_code == 200
            await ask(client, {"X-Tenant-Id": tenant})
    roots = [root_hash("fingerprint", r.cache_salt) for r in generator.started]
    assert len(set(roots)) == len(tenants) * len(salts)


async def test_answer_429_says_when_to_come_back(serve, generator):
    generator.fail_at, generator.error = 0, Overloaded("busy", retry_after_s=2.3)
    async with serve(TenantsConfig()) as client:
        answer = await ask(client)
        streamed = await ask(client, stream=True)
    for reply in (answer, streamed):
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "3" and reply.headers["retry-after-ms"] == "2300"
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert "x-ratelimit-limit-requests" not in reply.headers


def with_quota(generator, monkeypatch):
    """A desk of one process behind the generator; counts what is made into tokens."""
    desk = QuotaDesk(ProcessState(), expected_output_tokens=16)
    texts = []

    def encode(text, **options):
        texts.append(text)
        return Tokenizer.encode(generator.tokenizer, text, **options)

    monkeypatch.setattr(generator, "hold_quota", desk.hold, raising=False)
    monkeypatch.setattr(generator.tokenizer, "encode", encode)
    return desk, texts


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_quota_is_asked_before_a_long_prompt_is_made_into_tokens(
    serve, generator, monkeypatch, route
):
    desk, texts = with_quota(generator, monkeypatch)
    config = TenantsConfig(
        default=TenantConfig(requests_per_minute=1, tokens_per_minute=10**6, max_concurrent=1)
    )
    oversized = "a" * 50_000
    body = {"messages": [{"role": "user", "content": oversized}]}
    body = {"prompt": oversized} if route == "completions" else body
    async with serve(config) as client:
        too_long = await client.post(f"/v1/{route}", json=body)
        assert too_long.status_code == 400 and len(texts) == 1
        assert "context" in too_long.json()["error"]["message"]
        # What was held of the quota is free again.
        hold = await desk.hold("anonymous", config.default.record("anonymous").limits)
        refused = await client.post(f"/v1/{route}", json=body)
        assert refused.status_code == 429 and len(texts) == 1
        assert "is used up; try again in" in refused.json()["error"]["message"]
        hold.release()
        assert (await client.post(f"/v1/{route}", json=body)).status_code == 400
    assert len(texts) == 2 and not generator.started


async def test_quota_429_shows_the_limits(serve, generator):
    rates = (RateLimit("requests", 60, 0, 60.0), RateLimit("tokens", 1000, 250, 45.0))
    generator.fail_at = 0
    generator.error = QuotaExceeded("used up", retry_after_s=0.02, rate_limits=rates)
    async with serve(TenantsConfig()) as client:
        headers = (await ask(client)).headers
    assert headers["retry-after"] == "1" and headers["retry-after-ms"] == "20"
    assert headers["x-ratelimit-limit-requests"] == "60"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "60.000s"
    assert headers["x-ratelimit-remaining-tokens"] == "250"


@pytest.fixture
async def channel(generator, edge_config, metrics, keys_file):
    tenants = open_tenants(
        TenantsConfig(keys_file=keys_file), SloConfig(), shared=ProcessState(), metrics=metrics
    )
    server = GrpcServer(
        generator, host="127.0.0.1", port=0, metrics=metrics, config=edge_config, tenants=tenants
    )
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel
    await server.stop()


@pytest.fixture
def stub(channel):
    return inference_pb2_grpc.InferenceStub(channel)


REQUEST = pb.CompletionRequest(model="tiny", token_ids=pb.TokenIds(ids=[1, 2, 3]))


async def call(stub, *metadata):
    return [delta async for delta in stub.Generate(REQUEST, metadata=metadata)]


async def test_grpc_metadata_says_the_same(stub, generator):
    await call(
        stub,
        ("authorization", f"Bearer {KEY}"),
        ("x-slo-class", "interactive"),
        ("x-slo-itl-ms", "20"),
        ("x-priority", "-4"),
        ("x-session-id", "s"),
    )
    (request,) = generator.started
    assert (request.tenant, request.slo_class, request.priority) == ("acme", "interactive", -4)
    assert request.targets == SloTargets(2.0, 0.02) and request.session_key.endswith("\0s")
    assert request.limits == ACME.limits


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ((), CODE.UNAUTHENTICATED),
        ((("authorization", "Bearer nonsense"),), CODE.UNAUTHENTICATED),
        ((("authorization", f"Bearer {KEY}"), ("x-slo-class", "gold")), CODE.INVALID_ARGUMENT),
        ((("authorization", f"Bearer {KEY}"), ("x-priority", "z")), CODE.INVALID_ARGUMENT),
    ],
)
async def test_grpc_refusals(stub, generator, metadata, code):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(stub, *metadata)
    assert refused.value.code() is code and not generator.started
    if code is CODE.UNAUTHENTICATED:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
        assert refused.value.code() is code


@pytest.mark.parametrize("has_key", [True, False])
async def test_open_inference_takes_the_same_keys(channel, generator, has_key):
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = open_inference_pb2.ModelInferRequest(model_name="tiny")
    prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(b"a")
    metadata = [("authorization", f"Bearer {KEY}")] if has_key else []

    async def streamed():
        return [r async for r in stub.ModelStreamInfer(iter([request]), metadata=metadata)]

    def about_model(method, message):
        return method(message(name="tiny"), metadata=metadata)

    calls = [
        lambda: stub.ModelInfer(request, metadata=metadata),
        streamed,
        lambda: about_model(stub.ModelReady, open_inference_pb2.ModelReadyRequest),
        lambda: about_model(stub.ModelMetadata, open_inference_pb2.ModelMetadataRequest),
    ]
    for made in calls:
        if has_key:
            await made()
        else:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await made()
            assert refused.value.code() is CODE.UNAUTHENTICATED
    assert [r.tenant for r in generator.started] == ["acme", "acme"] * has_key
    # As GET /health and /version, these are open.
    assert (await stub.ServerLive(open_inference_pb2.ServerLiveRequest())).live
    assert (await stub.ServerReady(open_inference_pb2.ServerReadyRequest())).ready


async def test_grpc_overload_names_the_delay_in_the_ways_clients_know(stub, generator):
    generator.fail_at = 0
    generator.error = QuotaExceeded(
        "used up", retry_after_s=1.5, rate_limits=(RateLimit("requests", 60, 0, 60.0),)
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(stub, ("authorization", f"Bearer {KEY}"))
    assert refused.value.code() is CODE.RESOURCE_EXHAUSTED
    trailing = dict(refused.value.trailing_metadata())
    assert trailing["retry-after"] == "2" and trailing["retry-after-ms"] == "1500"
    assert trailing["grpc-retry-pushback-ms"] == "1500"
    assert trailing["x-ratelimit-limit-requests"] == "60"
