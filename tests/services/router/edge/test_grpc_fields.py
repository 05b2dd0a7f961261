"""The fields of baton.v1.Inference beside prompt and sampling, and that they mean what those of the
HTTP routes mean."""

from __future__ import annotations

import json

import grpc
import pytest

from baton.core.structured import StructuredKind
from baton.rpc.v1 import inference_pb2 as pb
from baton.rpc.v1 import inference_pb2_grpc, worker_pb2
from baton.telemetry.metrics import Metrics
from services.router.edge.grpc_server import GrpcServer
from services.router.requests.generation import ModelCard

HELLO = [pb.ChatMessage(role="user", content="hi")]
TOOL = pb.Tool(name="f", description="d", parameters='{"type": "object"}')
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture
async def stub(generator, edge_config, tokenizer):
    # A token is a byte here, and a tool's definition has some hundreds.
    generator.models = lambda: [ModelCard("tiny", 2048, tokenizer, 0)]
    server = GrpcServer(generator, host="127.0.0.1", port=0, metrics=Metrics(), config=edge_config)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield inference_pb2_grpc.InferenceStub(channel)
    await server.stop()


async def collect(call) -> list[pb.InferenceDelta]:
    return [delta async for delta in call]


async def refusal(call) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details()


async def test_several_answers_have_their_index(stub, generator):
    options = pb.RequestOptions(n=3)
    deltas = await collect(stub.Chat(pb.ChatRequest(messages=HELLO, options=options)))
    for index in range(3):
        own = [d for d in deltas if d.index == index]
        assert "".join(d.text for d in own) == "Hello, world"
        assert own[-1].finish_reason == worker_pb2.FINISH_REASON_STOP
    assert len({d.request_id for d in deltas}) == 1
    assert len(generator.started) == 3


async def test_options_reach_the_dispatcher(stub, generator, tokenizer):
    options = pb.RequestOptions(
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        truncate_prompt_tokens=2,
        cache_salt="s",
        priority=-3,
        bad_words=["no"],
        return_prompt_token_ids=True,
    )
    sampling = worker_pb2.SamplingParams(
        structured=worker_pb2.StructuredOutput(kind=worker_pb2.STRUCTURED_KIND_REGEX, text="[a-z]+")
    )
    request = pb.CompletionRequest(text="abcdef", options=options, sampling=sampling, stop=["z"])
    deltas = await collect(stub.Generate(request))
    (started,) = generator.started
    assert started.prompt_token_ids == tuple(tokenizer.encode("ef", add_special_tokens=False))
    assert started.includes_stop and started.sampling.include_stop_token
    assert not started.skip_special_tokens
    assert started.cache_salt and started.priority == -3
    assert started.sampling.structured.kind is StructuredKind.REGEX
    wanted = tuple(tokenizer.encode("no", add_special_tokens=False))
    assert wanted in started.sampling.bad_words_ids
    assert tuple(deltas[0].prompt_token_ids) == started.prompt_token_ids
    assert not any(d.prompt_token_ids for d in deltas[1:])


async def test_stop_string_is_named_at_the_end(stub):
    deltas = await collect(stub.Generate(pb.CompletionRequest(text="a", stop=[", "])))
    assert deltas[-1].stop_string == ", "
    assert "".join(d.text for d in deltas) == "Hello"


async def test_echo(stub):
    deltas = await collect(stub.Generate(pb.CompletionRequest(text="abc ", echo=True)))
    assert "".join(d.text for d in deltas) == "abc Hello, world"


async def test_tools_are_in_the_prompt_and_calls_are_found(stub, generator, tokenizer):
    generator.reply = lambda request: f"Well.\n{CALL}"
    request = pb.ChatRequest(messages=HELLO, tools=[TOOL])
    deltas = await collect(stub.Chat(request))
    prompt = tokenizer.decode(generator.started[0].prompt_token_ids)
    assert '"name": "f"' in prompt
    assert "".join(d.text for d in deltas) == "Well."
    pieces = [piece for d in deltas for piece in d.tool_calls]
    assert pieces[0].name == "f" and pieces[0].id.startswith("call_")
    assert json.loads("".join(p.arguments for p in pieces)) == {"a": 1}


async def test_conversation_with_calls_equals_that_over_http(stub, generator, direct):
    call = pb.ToolCall(id="1", name="f", arguments='{"a": 1}')
    messages = [
        *HELLO,
        pb.ChatMessage(role="assistant", tool_calls=[call]),
        pb.ChatMessage(role="tool", tool_call_id="1", content="5"),
    ]
    await collect(stub.Chat(pb.ChatRequest(messages=messages, tools=[TOOL])))
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    said = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [said]},
            {"role": "tool", "tool_call_id": "1", "content": "5"},
        ],
        "tools": [{"type": "function", "function": function}],
    }
    await direct.post("/v1/chat/completions", json=body)
    over_grpc, over_http = generator.started
    assert over_grpc.prompt_token_ids == over_http.prompt_token_ids


@pytest.mark.parametrize("mode", ["REQUIRED", "NAMED"])
async def test_forced_calls_have_a_structure(stub, generator, mode):
    choice = pb.ToolChoice(mode=pb.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{mode}"), name="f")
    generator.reply = lambda request: (
        '{"a": 1}' if mode == "NAMED" else '[{"name": "f", "parameters": {"a": 1}}]'
    )
    request = pb.ChatRequest(messages=HELLO, tools=[TOOL], tool_choice=choice)
    deltas = await collect(stub.Chat(request))
    assert generator.started[0].sampling.structured.kind is StructuredKind.JSON_SCHEMA
    pieces = [piece for d in deltas for piece in d.tool_calls]
    assert pieces[0].name == "f"
    assert json.loads("".join(p.arguments for p in pieces)) == {"a": 1}


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (pb.ChatRequest(messages=HELLO, tools=[pb.Tool(name="a b")]), "tools.0.function.name"),
        (
            pb.ChatRequest(messages=HELLO, tools=[pb.Tool(name="f", parameters="{")]),
            "tools.0.parameters",
        ),
        (
            pb.ChatRequest(
                messages=HELLO, tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)
            ),
            "tool_choice",
        ),
        (pb.ChatRequest(messages=HELLO, chat_template_kwargs="[1]"), "chat_template_kwargs"),
        (pb.ChatRequest(messages=HELLO, options=pb.RequestOptions(n=0)), "n:"),
        (
            pb.ChatRequest(messages=HELLO, options=pb.RequestOptions(truncate_prompt_tokens=-2)),
            "truncate_prompt_tokens",
        ),
        (
            pb.ChatRequest(
                messages=HELLO,
                sampling=worker_pb2.SamplingParams(
                    structured=worker_pb2.StructuredOutput(
                        kind=worker_pb2.STRUCTURED_KIND_REGEX, text="("
                    )
                ),
            ),
            "structured",
        ),
    ],
)
async def test_bad_fields_are_named(stub, generator, request_, name):
    assert name in await refusal(stub.Chat(request_))
    assert not generator.started
