"""baton.v1.Inference, health and reflection with a grpc.aio client."""

from __future__ import annotations

import asyncio
import gc
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.core.errors import BatonError, DeadlineExceeded, NoWorker, Overloaded
from baton.core.metrics import REJECTED
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc, worker_pb2
from baton.telemetry.metrics import Metrics
from fuzz_grpc import PREFACE, call_frames, send_bytes
from services.router.edge.grpc_server import INFERENCE, GrpcServer

Code = grpc.StatusCode
HELLO = [pb.ChatMessage(role="user", content="hi")]


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
async def channel(generator, edge_config, metrics):
    server = GrpcServer(generator, host="127.0.0.1", port=0, metrics=metrics, config=edge_config)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel
    await server.stop()


@pytest.fixture
def stub(channel):
    return inference_pb2_grpc.InferenceStub(channel)


def chat(**fields) -> pb.ChatRequest:
    return pb.ChatRequest(**{"model": "tiny", "messages": HELLO, **fields})


async def collect(call) -> list[pb.InferenceDelta]:
    return [delta async for delta in call]


async def refused(call, code: grpc.StatusCode) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    assert caught.value.code() is code
    return caught.value.details()


async def test_chat_streams_text_and_ends_with_reason_and_usage(stub, generator, tokenizer):
    deltas = await collect(stub.Chat(chat()))
    assert "".join(d.text for d in deltas) == "Hello, world"
    assert [d.finish_reason for d in deltas if d.finish_reason] == [worker_pb2.FINISH_REASON_STOP]
    assert deltas[-1].usage.completion_tokens == 12
    assert not any(d.HasField("usage") for d in deltas[:-1])
    assert {d.model for d in deltas} == {"tiny"}
    assert {d.request_id for d in deltas} == {generator.started[0].request_id}
    prompt = tokenizer.decode(generator.started[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<|bos|>[user]hi[assistant]"
    assert generator.started[0].sampling.max_tokens == 256 - len(prompt) + len("<|bos|>") - 1


async def test_generate_takes_text_or_token_ids(stub, generator, tokenizer):
    request = pb.CompletionRequest(model="tiny", text="abc")
    deltas = await collect(stub.Generate(request))
    assert generator.started[0].prompt_token_ids == tuple(
        tokenizer.encode("abc", add_special_tokens=True)
    )
    assert generator.started[0].sampling.max_tokens == 16
    ids = pb.CompletionRequest(model="tiny", token_ids=pb.TokenIds(ids=[1, 2]))
    again = await collect(stub.Generate(ids))
    assert generator.started[1].prompt_token_ids == (1, 2)
    assert [i for d in again for i in d.token_ids] == [i for d in deltas for i in d.token_ids]


async def test_sampling_and_stop_reach_the_dispatcher(stub, generator):
    sampling = worker_pb2.SamplingParams(
        max_tokens=4, temperature=0, top_k=5, seed=-7, logprobs=1, logit_bias={3: 1.5}
    )
    deltas = await collect(stub.Chat(chat(sampling=sampling, stop=["zz"])))
    request = generator.started[0]
    assert request.stop == ("zz",)
    assert request.sampling.is_greedy
    assert request.sampling.seed == -7
    assert request.sampling.logit_bias == ((3, 1.5),)
    assert deltas[-1].finish_reason == worker_pb2.FINISH_REASON_LENGTH
    assert sum(len(d.logprobs) for d in deltas) == 4


async def test_list_models(stub, generator):
    models = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [(m.id, m.max_model_len) for m in models] == [("tiny", 256)]
    generator.names = ()
    assert not (await stub.ListModels(pb.ListModelsRequest())).models


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (chat(model="x"), Code.NOT_FOUND, "tiny"),
        (chat(messages=[]), Code.INVALID_ARGUMENT, "messages is empty"),
        (chat(messages=[pb.ChatMessage(role="king")]), Code.INVALID_ARGUMENT, "'king'"),
        (
            chat(messages=[pb.ChatMessage(role="user", content="x" * 300)]),
            Code.INVALID_ARGUMENT,
            "256",
        ),
        (chat(stop=[""]), Code.INVALID_ARGUMENT, "stop"),
        *(
            (chat(sampling=worker_pb2.SamplingParams(**fields)), Code.INVALID_ARGUMENT, name)
            for name, fields in [
                ("temperature", {"temperature": -1}),
                ("temperature", {"temperature": float("nan")}),
                ("top_p", {"top_p": float("inf")}),
                ("top_k", {"top_k": -1}),
                ("max_tokens", {"max_tokens": 0}),
                ("max_tokens", {"max_tokens": 2**32 - 1}),
                ("logprobs", {"logprobs": 21}),
                ("stop_token_ids", {"stop_token_ids": [999]}),
                ("logit_bias", {"logit_bias": {999: 1}}),
                ("logit_bias", {"logit_bias": {1: 101}}),
                ("min_tokens", {"min_tokens": 3, "max_tokens": 2}),
            ]
        ),
    ],
)
async def test_bad_chat_request(stub, generator, request_, code, text):
    assert text in await refused(stub.Chat(request_), code)
    assert not generator.started


@pytest.mark.parametrize(
    "fields",
    [{}, {"text": ""}, {"token_ids": pb.TokenIds()}, {"token_ids": pb.TokenIds(ids=[258])},
     {"token_ids": pb.TokenIds(ids=[1] * 256)}, {"text": "x" * 200_000}],
)  # fmt: skip
async def test_bad_prompt(stub, fields):
    await refused(stub.Generate(pb.CompletionRequest(**fields)), Code.INVALID_ARGUMENT)


async def test_unknown_fields_are_refused_at_any_depth(channel):
    unknown = b"\xf8\x06\x01"  # field 111, varint 1
    whole = chat().SerializeToString() + unknown
    message = HELLO[0].SerializeToString() + unknown
    nested = b"\x0a\x04tiny" + b"\x12" + bytes([len(message)]) + message
    call = channel.unary_stream("/baton.v1.Inference/Chat")
    for data in (whole, nested):
        details = await refused(call(data), Code.INVALID_ARGUMENT)
        assert "111" in details
    listing = channel.unary_unary("/baton.v1.Inference/ListModels")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listing(unknown)
    assert caught.value.code() is Code.INVALID_ARGUMENT


async def test_path_that_is_no_text_does_not_end_the_server(generator, edge_config, metrics):
    server = GrpcServer(generator, host="127.0.0.1", port=0, metrics=metrics, config=edge_config)
    await server.start()
    data = b"".join([PREFACE, *call_frames(1, b"/a\xff/b", b"")])
    await send_bytes("127.0.0.1", server.port, data, wait_s=0.3)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert await collect(stub.Chat(chat(), timeout=5))
    await server.stop()


async def test_message_above_the_limit_is_refused_and_the_service_lives(
    stub, generator, edge_config
):
    long = pb.ChatMessage(role="user", content="x" * edge_config.max_body_bytes)
    details = await refused(stub.Chat(chat(messages=[long])), Code.RESOURCE_EXHAUSTED)
    assert str(edge_config.max_body_bytes) in details
    assert await collect(stub.Chat(chat()))
    assert len(generator.started) == 1


async def test_too_many_messages_are_refused_before_they_are_looked_at(channel, stub, edge_config):
    call = channel.unary_stream("/baton.v1.Inference/Chat")
    data = b"\x12\x00" * (edge_config.max_body_bytes // 2)
    assert "16384" in await refused(call(data), Code.INVALID_ARGUMENT)
    some = [pb.ChatMessage(role="user")] * 256
    assert "256 messages" in await refused(stub.Chat(chat(messages=some)), Code.INVALID_ARGUMENT)


async def test_masses_of_unknown_fields_are_refused_without_listing_them(channel):
    call = channel.unary_stream("/baton.v1.Inference/Chat")
    details = await refused(call(b"\xf8\x06\x01" * 5000), Code.INVALID_ARGUMENT)
    assert "15000 bytes of unknown fields" in details


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        ("unary_stream", "/baton.v1.Inference/Chat"),
        ("unary_unary", "/baton.v1.Inference/ListModels"),
        ("stream_stream", "/inference.GRPCInferenceService/ModelStreamInfer"),
        ("unary_unary", "/inference.GRPCInferenceService/ServerLive"),
        ("unary_stream", "/grpc.health.v1.Health/Watch"),
        ("stream_stream", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
    ],
)
async def test_undecodable_message_is_bad_input(channel, stub, metrics, caplog, shape, path):
    data = b"\xff\xff\xff"
    call = getattr(channel, shape)(path)(data if shape[:5] == "unary" else iter([data]))
    if shape == "unary_unary":
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert "cannot be decoded" in await call.details()
        assert await call.code() is Code.INVALID_ARGUMENT
    else:
        assert "cannot be decoded" in await refused(call, Code.INVALID_ARGUMENT)
    assert f'{REJECTED.name}{{status="400"}} 1.0' in metrics.render().decode()
    assert "Traceback" not in caplog.text and "Unexpected" not in caplog.text
    assert await collect(stub.Chat(chat()))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("full", retry_after_s=3), Code.RESOURCE_EXHAUSTED),
        (NoWorker("none"), Code.UNAVAILABLE),
        (DeadlineExceeded("late"), Code.DEADLINE_EXCEEDED),
        (ZeroDivisionError("/secret"), Code.INTERNAL),
    ],
)
@pytest.mark.parametrize("position", [0, 3])
async def test_failures_have_their_code(stub, generator, error, code, position):
    generator.fail_at, generator.error = position, error
    details = await refused(stub.Chat(chat()), code)
    assert "/secret" not in details


async def test_overload_says_when_to_retry(stub, generator):
    generator.fail_at, generator.error = 0, Overloaded("full", retry_after_s=2.5)
    call = stub.Chat(chat())
    await refused(call, Code.RESOURCE_EXHAUSTED)
    assert dict(await call.trailing_metadata())["retry-after"] == "3"


async def test_cancel_closes_the_generation(stub, generator):
    generator.step_s = 0.02
    call = stub.Chat(chat())
    await call.read()
    call.cancel()
    await generator.until_idle(1, timeout_s=1)
    assert generator.closed_early


async def test_cancel_before_the_first_token_closes_too(stub, generator):
    generator.step_s = 30
    call = stub.Chat(chat())
    reading = asyncio.ensure_future(call.read())
    while not generator.started:
        await asyncio.sleep(0.005)
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await generator.until_idle(1, timeout_s=1)
    assert generator.closed_early


async def test_client_deadline_is_handed_on_and_kept(stub, generator):
    generator.step_s = 30
    started_at = time.monotonic()
    await refused(stub.Chat(chat(), timeout=0.2), Code.DEADLINE_EXCEEDED)
    assert time.monotonic() - started_at < 1
    # The time left is carried in the units of the client's clock.
    assert generator.started[0].deadline_s <= 0.21
    await generator.until_idle(1, timeout_s=1)


async def test_our_deadline_is_the_default(stub, generator, edge_config):
    await collect(stub.Chat(chat()))
    assert generator.started[0].deadline_s == edge_config.deadline_s


async def test_parallel_streams(stub, generator):
    generator.step_s = 0.001

    async def one(length: int) -> int:
        request = chat(sampling=worker_pb2.SamplingParams(max_tokens=length))
        return sum(len(d.token_ids) for d in await collect(stub.Chat(request)))

    assert await asyncio.gather(*map(one, range(1, 12))) == list(range(1, 12))


async def test_health_follows_the_dispatcher(channel, generator):
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", INFERENCE):
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    generator.is_ready = False
    changed = await asyncio.wait_for(watch.read(), 3)
    assert changed.status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_reflection_lists_and_describes(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=INFERENCE),
    ]
    replies = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
    names = {s.name for s in replies[0].list_services_response.service}
    assert {INFERENCE, "grpc.health.v1.Health"} <= names
    assert replies[1].file_descriptor_response.file_descriptor_proto


async def test_refusals_are_counted(stub, metrics):
    await refused(stub.Chat(chat(model="x")), Code.NOT_FOUND)
    assert f'{REJECTED.name}{{status="404"}} 1.0' in metrics.render().decode()


async def test_stop_ends_open_streams_in_time(generator, edge_config, metrics):
    server = GrpcServer(generator, host="127.0.0.1", port=0, metrics=metrics, config=edge_config)
    await server.start()
    generator.step_s = 30
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Chat(chat())
        reading = asyncio.ensure_future(call.read())
        while not generator.started:
            await asyncio.sleep(0.005)
        await asyncio.wait_for(server.stop(), 2)
        with pytest.raises(grpc.aio.AioRpcError):
            await reading
    await generator.until_idle(1)
    assert generator.closed_early


@pytest.mark.parametrize("is_unknown", [False, True], ids=["amid the answer", "on arrival"])
async def test_call_that_fails_is_let_go_of_without_a_collection(stub, generator, is_unknown):
    def num_held() -> int:
        # The server's own; what it was raised for hangs on its traceback.
        return sum(issubclass(type(o), BatonError) for o in gc.get_objects())

    model = "x" if is_unknown else "tiny"
    code = Code.NOT_FOUND if is_unknown else Code.RESOURCE_EXHAUSTED
    generator.fail_at = 2
    gc.collect()
    gc.disable()
    try:
        num_before = num_held()
        for _ in range(10):
            generator.error = Overloaded("full")
            await refused(stub.Chat(chat(model=model)), code)
        generator.error = None
        await asyncio.sleep(0.1)
        assert num_held() <= num_before + 2
    finally:
        gc.enable()
