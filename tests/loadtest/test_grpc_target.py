"""The gRPC target against a scripted server: tokens, refusals, deadlines, cut streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from baton.core.errors import InvalidRequest, Unavailable
from baton.loadtest.generator_watch import RunClock
from baton.loadtest.grpc_target import GrpcOptions, GrpcTarget
from baton.loadtest.outcome import Outcome
from baton.loadtest.target import Ask, Message, Prompt
from baton.rpc.channel import new_server
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc, worker_pb2

ASK = Ask(Prompt((Message("user", "hello"),)), 3, "bench-1")


class Scripted(inference_pb2_grpc.InferenceServicer):
    """Does what the model's name says."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.requests: list[pb.ChatRequest | pb.CompletionRequest] = []

    async def Chat(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.InferenceDelta]:
        self.metadata = {str(k): str(v) for k, v in context.invocation_metadata() or ()}
        self.requests.append(request)
        if request.model == "refuses":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests")
        if request.model == "hangs":
            await asyncio.sleep(60)
        for i in range(3):
            yield pb.InferenceDelta(text="a", token_ids=[i])
            if request.model == "breaks" and i == 1:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker was lost")
        if request.model != "cuts":
            usage = pb.Usage(prompt_tokens=9, completion_tokens=3, cached_tokens=4)
            yield pb.InferenceDelta(finish_reason=worker_pb2.FINISH_REASON_LENGTH, usage=usage)

    async def Generate(
        self, request: pb.CompletionRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.InferenceDelta]:
        self.requests.append(request)
        yield pb.InferenceDelta(finish_reason=worker_pb2.FINISH_REASON_STOP)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        if not self.requests:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "show a key")
        return pb.ListModelsResponse(models=[pb.Model(id="m")])


@pytest.fixture
async def served() -> AsyncIterator[tuple[Scripted, str]]:
    server, scripted = new_server(), Scripted()
    inference_pb2_grpc.add_InferenceServicer_to_server(scripted, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield scripted, f"127.0.0.1:{port}"
    await server.stop(0)


async def asked(address: str, model: str, ask: Ask = ASK, **options: object) -> Outcome:
    clock = RunClock()
    given = GrpcOptions(address, model, **options)  # type: ignore[arg-type]
    target = GrpcTarget(given, clock)
    outcome = Outcome(0, clock)
    try:
        await target.prepare(ask).run(outcome)
    finally:
        await target.aclose()
    return outcome


async def test_tokens_usage_and_metadata(served: tuple[Scripted, str]) -> None:
    scripted, address = served
    outcome = await asked(address, "m", headers=(("X-SLO-Class", "fast"),))
    assert outcome.is_ok
    assert len(outcome.token_times_s) == outcome.num_tokens == 3
    assert (outcome.num_prompt_tokens, outcome.num_cached_tokens) == (9, 4)
    assert outcome.finish_reason == "length"
    assert scripted.metadata["x-request-id"] == "bench-1"
    assert scripted.metadata["x-slo-class"] == "fast"
    (request,) = scripted.requests
    assert request.sampling.max_tokens == 3 and request.sampling.ignore_eos


@pytest.mark.parametrize(
    ("model", "label", "says"),
    [
        ("refuses", "refused RESOURCE_EXHAUSTED", "too many requests"),
        ("breaks", "stream_error UNAVAILABLE", "the worker was lost"),
        ("cuts", "cut_off", "without a finish reason"),
        ("hangs", "timeout", "not over within 0.3 s"),
    ],
)
async def test_faults_are_told_by_kind(
    served: tuple[Scripted, str], model: str, label: str, says: str
) -> None:
    outcome = await asked(served[1], model, timeout_s=0.3 if model == "hangs" else 20)
    assert outcome.error is not None and not outcome.is_ok
    assert outcome.error.label == label
    assert says in outcome.error.message


async def test_token_ids_and_texts_are_completions(served: tuple[Scripted, str]) -> None:
    scripted, address = served
    await asked(address, "m", Ask(Prompt(ids=(5, 6)), 1, "r"), is_chat=False)
    await asked(address, "m", Ask(Prompt((Message("user", "hi"),)), 1, "r"), is_chat=False)
    ids, text = scripted.requests
    assert isinstance(ids, pb.CompletionRequest) and isinstance(text, pb.CompletionRequest)
    assert list(ids.token_ids.ids) == [5, 6]
    assert text.text == "hi"


async def test_nobody_there_is_told_at_connect_and_before(served: tuple[Scripted, str]) -> None:
    outcome = await asked("127.0.0.1:9", "m")
    assert outcome.error is not None and outcome.error.label == "connect"
    nobody = GrpcTarget(GrpcOptions("127.0.0.1:9"), RunClock())
    with pytest.raises(Unavailable, match=r"nothing answers at 127\.0\.0\.1:9"):
        await nobody.model_names()
    await nobody.aclose()
    target = GrpcTarget(GrpcOptions(served[1]), RunClock())
    with pytest.raises(InvalidRequest, match="UNAUTHENTICATED: show a key"):
        await target.model_names()
    await target.aclose()
