"""inference.GRPCInferenceService with a grpc.aio client."""

from __future__ import annotations

import asyncio
import json
import struct

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import baton
from baton.core.errors import DeadlineExceeded, NoWorker, Overloaded
from baton.core.metrics import REJECTED
from baton.rpc.v1 import open_inference_pb2 as pb
from baton.rpc.v1 import open_inference_pb2_grpc
from baton.telemetry.metrics import Metrics
from services.router.edge import open_inference_api
from services.router.edge.grpc_server import OPEN_INFERENCE, GrpcServer

Code = grpc.StatusCode
Tensor = pb.ModelInferRequest.InferInputTensor
CHOICES = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


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
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def texts(*values: bytes | str, name: str = "text_input") -> Tensor:
    data = [v.encode() if isinstance(v, str) else v for v in values]
    return Tensor(
        name=name,
        datatype="BYTES",
        shape=[len(data)],
        contents=pb.InferTensorContents(bytes_contents=data),
    )


def ask(*inputs: Tensor, outputs=(), raw=(), name="tiny", version="", id="", **parameters):
    request = pb.ModelInferRequest(
        model_name=name,
        model_version=version,
        id=id,
        inputs=inputs or [texts("abc")],
        raw_input_contents=raw,
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=o) for o in outputs],
    )
    for key, value in parameters.items():
        setattr(request.parameters[key], CHOICES[type(value)], value)
    return request


def values(response: pb.ModelInferResponse) -> dict[str, list]:
    """Of typed contents, with the datatypes checked on the way."""
    found = {}
    for tensor in response.outputs:
        field = {"BYTES": "bytes_contents", "INT32": "int_contents"}[tensor.datatype]
        found[tensor.name] = list(getattr(tensor.contents, field))
        assert list(tensor.shape) == [len(found[tensor.name])]
    return found


async def refused(call, code: grpc.StatusCode = Code.INVALID_ARGUMENT) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code
    return caught.value.details()


async def streamed(stub, *requests) -> list[pb.ModelStreamInferResponse]:
    return [response async for response in stub.ModelStreamInfer(iter(requests))]


async def test_whole_answer_with_reason_and_counts(stub, generator, tokenizer):
    response = await stub.ModelInfer(ask(id="mine", temperature=0, max_tokens=64, top_p=0.5))
    assert (response.model_name, response.model_version, response.id) == ("tiny", "1", "mine")
    assert values(response) == {
        "text_output": [b"Hello, world"],
        "finish_reason": [b"stop"],
        "prompt_tokens": [4],
        "completion_tokens": [12],
        "cached_tokens": [2],
    }
    (request,) = generator.started
    assert request.prompt_token_ids == tuple(tokenizer.encode("abc", add_special_tokens=True))
    assert request.sampling.is_greedy
    assert (request.sampling.max_tokens, request.sampling.top_p) == (64, 0.5)


async def test_stream_gives_pieces_and_ends_with_reason_and_counts(stub):
    whole = values(await stub.ModelInfer(ask()))
    responses = [r.infer_response for r in await streamed(stub, ask(id="s", stream=True))]
    pieces = [values(r) for r in responses]
    assert len(pieces) == 12
    assert b"".join(p["text_output"][0] for p in pieces) == whole["text_output"][0]
    assert {**pieces[-1], "text_output": None} == {**whole, "text_output": None}
    assert all(set(p) == {"text_output"} for p in pieces[:-1])
    assert {r.id for r in responses} == {"s"}
    finals = [r.parameters["triton_final_response"].bool_param for r in responses]
    assert finals == [False] * 11 + [True]


async def test_one_stream_carries_many_requests_and_outlives_a_wrong_one(stub, generator):
    generator.reply = lambda request: str(len(request.prompt_token_ids))
    requests = [ask(texts("x" * i), id=str(i), stream=i % 2 == 0) for i in range(1, 40)]
    requests[7].parameters["top_p"].double_param = 7
    responses = await streamed(stub, *requests)
    text = {str(i): b"" for i in range(1, 40)}
    errors = {}
    for response in responses:
        id_ = response.infer_response.id
        if response.error_message:
            code = response.infer_response.parameters["error_code"].string_param
            errors[id_] = (response.error_message, code)
        else:
            text[id_] += values(response.infer_response)["text_output"][0]
    ((message, code),) = errors.values()
    assert errors.keys() == {"8"} and "top_p" in message and code == "INVALID_ARGUMENT"
    assert text == {str(i): b"" if i == 8 else str(i + 1).encode() for i in range(1, 40)}


async def test_one_stream_runs_a_bounded_number_at_a_time(stub, generator, monkeypatch):
    monkeypatch.setattr(open_inference_api, "MAX_PER_STREAM", 3)
    most = 0

    def reply(request):
        nonlocal most
        running = len(generator.started) - len(generator.finished)
        most = max(most, running)
        return "ab"

    generator.reply, generator.step_s = reply, 0.005
    assert len(await streamed(stub, *[ask(id=str(i)) for i in range(12)])) == 12
    assert most == 3


async def test_raw_contents_are_read_and_answered_in_kind(stub, generator):
    raw = struct.pack("<I", 3) + b"abc"
    tensor = Tensor(name="text_input", datatype="BYTES", shape=[1, 1])
    response = await stub.ModelInfer(ask(tensor, raw=[raw]))
    assert response.raw_output_contents[0] == struct.pack("<I", 12) + b"Hello, world"
    assert response.raw_output_contents[3] == struct.pack("<i", 12)
    assert not any(t.HasField("contents") for t in response.outputs)


@pytest.mark.parametrize(
    ("datatype", "code"), [("INT32", "i"), ("INT64", "q"), ("UINT32", "I"), ("UINT64", "Q")]
)
async def test_token_ids_are_a_prompt(stub, generator, datatype, code):
    tensor = Tensor(name="input_ids", datatype=datatype, shape=[3])
    await stub.ModelInfer(ask(tensor, raw=[struct.pack(f"<3{code}", 5, 6, 7)]))
    assert generator.started[0].prompt_token_ids == (5, 6, 7)


async def test_many_prompts_and_answers_come_in_order(stub, generator):
    generator.reply = lambda request: str(len(request.prompt_token_ids))
    response = await stub.ModelInfer(ask(texts("a", "bb"), n=2, outputs=["text_output"]))
    assert values(response) == {"text_output": [b"2", b"2", b"3", b"3"]}


async def test_parameters_may_come_as_json_and_as_tensors(stub, generator):
    fields = {"stop": ["zz", "y"], "stop_token_ids": [7], "seed": -1}
    stream = Tensor(name="stream", datatype="BOOL", shape=[1], contents={"bool_contents": [True]})
    json_tensor = texts(json.dumps(fields), name="sampling_parameters")
    await streamed(stub, ask(texts("a"), json_tensor, stream))
    await stub.ModelInfer(ask(sampling_parameters=json.dumps(fields)))
    for request in generator.started:
        assert request.stop == ("zz", "y")
        assert request.sampling.seed == -1
        assert request.sampling.stop_token_ids == (7,)


async def test_what_tritons_clients_add_changes_nothing(stub):
    request = ask(
        triton_enable_empty_final_response=True, sequence_id=0, sequence_start=False, priority=3
    )
    assert values(await stub.ModelInfer(request))["text_output"] == [b"Hello, world"]


def int_tensor(**fields) -> Tensor:
    return Tensor(**{"name": "input_ids", "datatype": "INT32", **fields})


HUGE = Tensor(name="text_input", datatype="BYTES", shape=[2**62, 2**62, 4])
UNTYPED = Tensor(name="text_input", datatype="BYTES", shape=[1])
BAD = [
    (ask(name="x"), Code.NOT_FOUND, "tiny"),
    (ask(version="2"), Code.NOT_FOUND, "version '2'"),
    (ask(stream=True), Code.INVALID_ARGUMENT, "ModelStreamInfer"),
    (ask(outputs=["logits"]), Code.INVALID_ARGUMENT, "text_output"),
    (ask(texts(name="image")), Code.INVALID_ARGUMENT, "'image'"),
    (ask(texts("a"), texts("a")), Code.INVALID_ARGUMENT, "twice"),
    (ask(texts(name="sampling_parameters")), Code.INVALID_ARGUMENT, "input_ids"),
    (ask(texts("a"), int_tensor(shape=[0])), Code.INVALID_ARGUMENT, "one of the inputs"),
    (ask(texts()), Code.INVALID_ARGUMENT, "no element"),
    (ask(texts(b"a\xff")), Code.INVALID_ARGUMENT, "text_input[0] is not UTF-8 at byte 1"),
    (ask(texts("x" * 300)), Code.INVALID_ARGUMENT, "256"),
    (ask(texts("a"), texts("{", name="sampling_parameters")), Code.INVALID_ARGUMENT, "JSON"),
    (ask(sampling_parameters="[]"), Code.INVALID_ARGUMENT, "JSON object"),
    (ask(sampling_parameters=5), Code.INVALID_ARGUMENT, "JSON object"),
    (ask(max_tokens=1, sampling_parameters='{"max_tokens":2}'), Code.INVALID_ARGUMENT, "twice"),
    (ask(sampling_parameters='{"model":"tiny"}'), Code.INVALID_ARGUMENT, "'model'"),
    (ask(max_tokens="5"), Code.INVALID_ARGUMENT, "max_tokens"),
    (ask(max_tokens=0), Code.INVALID_ARGUMENT, "max_tokens"),
    (ask(temperature=float("nan")), Code.INVALID_ARGUMENT, "temperature"),
    (ask(top_p=float("inf")), Code.INVALID_ARGUMENT, "top_p"),
    (ask(echo=True), Code.INVALID_ARGUMENT, "'echo'"),
    (ask(bogus=1), Code.INVALID_ARGUMENT, "'bogus'"),
    (ask(sequence_id=5), Code.INVALID_ARGUMENT, "sequence"),
    (ask(timeout=-1), Code.INVALID_ARGUMENT, "microseconds"),
    (ask(timeout=True), Code.INVALID_ARGUMENT, "microseconds"),
    (ask(HUGE), Code.INVALID_ARGUMENT, "elements"),
    (ask(UNTYPED), Code.INVALID_ARGUMENT, "0 elements"),
    (ask(UNTYPED, raw=[b"\x01"]), Code.INVALID_ARGUMENT, "element 0"),
    (ask(UNTYPED, raw=[struct.pack("<I", 2**32 - 1)]), Code.INVALID_ARGUMENT, "element 0"),
    (ask(UNTYPED, raw=[b"", b""]), Code.INVALID_ARGUMENT, "2 entries for 1 inputs"),
    (ask(texts("a"), raw=[b"\1\0\0\0a"]), Code.INVALID_ARGUMENT, "one of them"),
    (ask(int_tensor(shape=[-1])), Code.INVALID_ARGUMENT, "[-1]"),
    (ask(int_tensor(shape=[1] * 9)), Code.INVALID_ARGUMENT, "8 dimensions"),
    (ask(int_tensor(shape=[1], datatype="FP16")), Code.INVALID_ARGUMENT, "'FP16'"),
    (ask(int_tensor(shape=[1]), raw=[b"abc"]), Code.INVALID_ARGUMENT, "multiple of 4"),
    (ask(int_tensor(shape=[1], contents={"fp32_contents": [1]})), Code.INVALID_ARGUMENT, "int_con"),
    (ask(int_tensor(datatype="FP32", shape=[0])), Code.INVALID_ARGUMENT, "datatype INT32"),
    (ask(int_tensor(shape=[1], contents={"int_contents": [-4]})), Code.INVALID_ARGUMENT, "-4"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "code", "text"), BAD)
async def test_bad_input_is_refused_by_name_and_in_streams_too(
    stub, generator, request_, code, text
):
    assert text in await refused(stub.ModelInfer(request_), code)
    if "stream" not in request_.parameters:
        (response,) = await streamed(stub, request_)
        assert text in response.error_message
        assert response.infer_response.parameters["error_code"].string_param == code.name
    assert not generator.started


async def test_stream_of_several_answers_is_refused(stub, generator):
    (response,) = await streamed(stub, ask(stream=True, n=2))
    assert "2" in response.error_message and not generator.started


async def test_parameter_without_a_value_and_unknown_fields_are_refused(stub, channel):
    request = ask()
    request.parameters["max_tokens"].SetInParent()
    assert "max_tokens" in await refused(stub.ModelInfer(request))
    call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    assert "111" in await refused(call(ask().SerializeToString() + b"\xf8\x06\x01"))


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
    details = await refused(stub.ModelInfer(ask()), code)
    *_, last = await streamed(stub, ask(stream=True))
    assert last.error_message == details and "/secret" not in details
    assert last.infer_response.parameters["error_code"].string_param == code.name


async def test_deadlines_of_call_and_request_reach_the_dispatcher(stub, generator):
    await stub.ModelInfer(ask(), timeout=7)
    await stub.ModelInfer(ask(timeout=3_000_000), timeout=7)
    await stub.ModelInfer(ask(timeout=0))
    first, second, third = (request.deadline_s for request in generator.started)
    # gRPC rounds up what is left.
    assert 5 < first < 7.5 and second == 3 and third > 7.5


@pytest.mark.parametrize("kind", ["whole", "pieces"])
async def test_cancel_closes_the_generations(stub, generator, kind):
    generator.step_s = 0.02
    if kind == "whole":
        call = stub.ModelInfer(ask())
        num = 1
    else:
        call = stub.ModelStreamInfer(iter([ask(stream=True), ask(stream=True)]))
        await call.read()
        num = 2
    while len(generator.started) < num:
        await asyncio.sleep(0.005)
    call.cancel()
    await generator.until_idle(num, timeout_s=1)
    assert len(generator.closed_early) == num


async def test_stop_of_the_server_ends_open_streams(generator, edge_config, metrics):
    server = GrpcServer(generator, host="127.0.0.1", port=0, metrics=metrics, config=edge_config)
    await server.start()
    generator.step_s = 30
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(iter([ask()]))
        reading = asyncio.ensure_future(call.read())
        while not generator.started:
            await asyncio.sleep(0.005)
        await asyncio.wait_for(server.stop(), 2)
        with pytest.raises(grpc.aio.AioRpcError):
            await reading
    await generator.until_idle(1)
    assert generator.closed_early


async def test_what_is_served_is_told(stub, channel, generator):
    assert (await stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
    server = await stub.ServerMetadata(pb.ServerMetadataRequest())
    assert (server.name, server.version) == ("baton", baton.__version__)
    for name, version, ready in [("tiny", "", 1), ("tiny", "1", 1), ("tiny", "2", 0), ("x", "", 0)]:
        asked = pb.ModelReadyRequest(name=name, version=version)
        assert (await stub.ModelReady(asked)).ready == bool(ready)
    model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"))
    assert list(model.versions) == ["1"]
    assert {t.name: t.datatype for t in model.inputs}["text_input"] == "BYTES"
    response = await stub.ModelInfer(ask())
    assert [(t.name, t.datatype) for t in response.outputs] == [
        (t.name, t.datatype) for t in model.outputs
    ]
    asked = pb.ModelMetadataRequest(name="x")
    assert "tiny" in await refused(stub.ModelMetadata(asked), Code.NOT_FOUND)


async def test_ready_and_health_follow_the_dispatcher(stub, channel, generator):
    health = health_pb2_grpc.HealthStub(channel)
    check = health_pb2.HealthCheckRequest(service=OPEN_INFERENCE)
    assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
    generator.is_ready = False
    assert not (await stub.ServerReady(pb.ServerReadyRequest())).ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="tiny"))).ready
    while (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING:
        await asyncio.sleep(0.02)


async def test_reflection_lists_it(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=OPEN_INFERENCE),
    ]
    replies = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
    assert OPEN_INFERENCE in {s.name for s in replies[0].list_services_response.service}
    assert replies[1].file_descriptor_response.file_descriptor_proto


async def test_refusals_are_counted_once(stub, metrics):
    await refused(stub.ModelInfer(ask(name="x")), Code.NOT_FOUND)
    await streamed(stub, ask(name="x"))
    assert f'{REJECTED.name}{{status="404"}} 2.0' in metrics.render().decode()
