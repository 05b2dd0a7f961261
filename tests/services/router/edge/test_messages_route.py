"""POST /v1/messages and its count of tokens, with a scripted dispatcher and Anthropic's client."""

from __future__ import annotations

import json

import anthropic
import httpx
import pytest

from baton.core.errors import NoWorker, Overloaded, WorkerLost
from baton.core.structured import StructuredKind
from baton.telemetry.metrics import Metrics
from services.router.admission.slo_config import SloConfig
from services.router.edge.http_app import HttpApp
from services.router.requests.generation import ModelCard
from services.router.shared.process_state import ProcessState
from services.router.shared.state import TenantRecord, hash_key
from services.router.tenants.tenants import open_tenants
from services.router.tenants.tenants_config import TenantsConfig

ROUTE, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {}}}
TOOL = {"name": "f", "description": "d", "input_schema": SCHEMA}
CHAT_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": SCHEMA},
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(autouse=True)
def long_context(generator, tokenizer):
    # A token is a byte here, and a tool's definition has some hundreds.
    generator.models = lambda: [ModelCard("tiny", 2048, tokenizer, 0)]


async def create(client, **fields) -> dict:
    body = {"messages": HELLO, "max_tokens": 100, **fields}
    response = await client.post(ROUTE, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def events(client, **fields) -> list[dict]:
    body = {"messages": HELLO, "max_tokens": 100, "stream": True, **fields}
    response = await client.post(ROUTE, json=body)
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        found.append(event)
    return found


async def chat_prompt(client, generator, messages, **fields) -> tuple[int, ...]:
    response = await client.post(CHAT, json={"messages": messages, **fields})
    assert response.status_code == 200, response.text
    return generator.started[-1].prompt_token_ids


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["message"]
    return body["error"]


async def test_answer(direct):
    message = await create(direct, max_tokens=5)
    assert message["content"] == [{"type": "text", "text": "Hello"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert message["usage"]["output_tokens"] == 5
    assert (await create(direct))["stop_reason"] == "end_turn"


async def test_cached_tokens_are_counted_apart(direct, generator):
    usage = (await create(direct))["usage"]
    num_prompt_tokens = len(generator.started[-1].prompt_token_ids)
    assert usage["cache_read_input_tokens"] == num_prompt_tokens // 2
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_prompt_tokens


async def test_text_and_prompt_are_those_of_the_chat_route(direct, generator):
    fields = {"temperature": 0.5, "top_k": 3, "seed": 1}
    whole = await create(direct, system="short", **fields)
    asked = generator.started[-1]
    streamed = await events(direct, system=[{"type": "text", "text": "short"}], **fields)
    messages = [{"role": "system", "content": "short"}, *HELLO]
    body = {"messages": messages, "max_tokens": 100, **fields}
    chat = (await direct.post(CHAT, json=body)).json()
    prompts = {request.prompt_token_ids for request in generator.started}
    assert prompts == {asked.prompt_token_ids}
    assert asked.sampling == generator.started[-1].sampling
    text = chat["choices"][0]["message"]["content"]
    assert whole["content"][0]["text"] == text
    deltas = [e["delta"]["text"] for e in streamed if e["type"] == "content_block_delta"]
    assert deltas == list(text)


async def test_events_of_a_text(direct):
    found = await events(direct, max_tokens=2)
    assert [event["type"] for event in found] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    start = found[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["input_tokens"] > 0
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 2


async def test_stop_sequences(direct):
    message = await create(direct, stop_sequences=["wor", "xyz"])
    assert message["content"][0]["text"] == "Hello, "
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "wor")
    end = (await events(direct, stop_sequences=["wor"]))[-2]
    assert end["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "wor"}


async def test_empty_output_has_no_blocks(direct, generator):
    generator.reply = lambda request: ""
    assert (await create(direct))["content"] == []
    assert [e["type"] for e in await events(direct)] == [
        "message_start", "ping", "message_delta", "message_stop",
    ]  # fmt: skip


async def test_calls_of_tools(direct, generator):
    generator.reply = lambda request: "thinking" + CALL
    message = await create(direct, tools=[TOOL])
    text, call = message["content"]
    assert text == {"type": "text", "text": "thinking"}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "f", {"a": 1})
    assert message["stop_reason"] == "tool_use"
    prompt = generator.started[-1].prompt_token_ids
    assert prompt == await chat_prompt(direct, generator, HELLO, tools=[CHAT_TOOL])
    streamed = await events(direct, tools=[TOOL])
    (start,) = [e for e in streamed if e.get("content_block", {}).get("type") == "tool_use"]
    assert (start["index"], start["content_block"]["input"]) == (1, {})
    parts = [
        e["delta"]["partial_json"]
        for e in streamed
        if e["type"] == "content_block_delta" and e["index"] == 1
    ]
    assert json.loads("".join(parts)) == {"a": 1}
    assert streamed[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "reply"),
    [
        ({"type": "any"}, '[{"name": "f", "parameters": {"a": 2}}]'),
        ({"type": "tool", "name": "f"}, '{"a": 2}'),
    ],
)
async def test_forced_calls(direct, generator, choice, reply):
    generator.reply = lambda request: reply
    message = await create(direct, tools=[TOOL], tool_choice=choice)
    (call,) = message["content"]
    assert call["input"] == {"a": 2}
    assert message["stop_reason"] == "tool_use"
    assert generator.started[-1].sampling.structured.kind is StructuredKind.JSON_SCHEMA


async def test_no_tools_where_none_are_wanted(direct, generator):
    await create(direct, tools=[TOOL], tool_choice={"type": "none"})
    prompt = generator.started[-1].prompt_token_ids
    assert prompt == await chat_prompt(direct, generator, HELLO)


async def test_one_call_where_parallel_ones_are_not_wanted(direct, generator):
    generator.reply = lambda request: CALL + CALL
    assert len((await create(direct, tools=[TOOL]))["content"]) == 2
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert len((await create(direct, tools=[TOOL], tool_choice=choice))["content"]) == 1


async def test_blocks_become_the_messages_of_the_chat_route(direct, generator):
    cached = {"cache_control": {"type": "ephemeral"}}
    given = [
        {"role": "user", "content": [{"type": "text", "text": "a", **cached}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "text", "text": "b"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "f", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "one"},
            {"type": "tool_result", "tool_use_id": "c2", "is_error": True,
             "content": [{"type": "text", "text": "two"}]},
            {"type": "text", "text": "c"},
        ]},
    ]  # fmt: skip
    await create(direct, messages=given)
    prompt = generator.started[-1].prompt_token_ids
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": arguments}}
        for i, arguments in ((1, '{"a": 1}'), (2, "{}"))
    ]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
        {"role": "user", "content": "c"},
    ]
    assert prompt == await chat_prompt(direct, generator, messages)
    await create(
        direct, messages=[*given[:2], {"role": "user", "content": given[2]["content"][:2]}]
    )
    prompt = generator.started[-1].prompt_token_ids
    assert prompt == await chat_prompt(direct, generator, messages[:-1])


async def test_an_answer_begun_by_the_client_goes_on(direct, generator):
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    await create(direct, messages=messages)
    prompt = generator.started[-1].prompt_token_ids
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt == await chat_prompt(direct, generator, messages, **fields)


async def test_structured_output(direct, generator):
    schema = {"type": "object"}
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    await create(direct, output_config=wanted)
    assert json.loads(generator.started[-1].sampling.structured.text) == schema


async def test_unknown_fields_are_tolerated(direct):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    metadata = {"user_id": "u"}
    await create(direct, thinking=thinking, metadata=metadata, service_tier="auto", made_up=1)


async def test_tokens_are_counted_without_a_generation(direct, generator):
    body = {"messages": HELLO, "system": "s", "tools": [TOOL]}
    answer = await direct.post(COUNT, json=body)
    assert not generator.started
    await create(direct, **body)
    assert answer.json() == {"input_tokens": len(generator.started[0].prompt_token_ids)}


BAD = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x"}]}]},
     "messages.0.content.0.type"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]},
     "messages.0.content.0.name"),
    ({"messages": [{"role": "assistant",
                    "content": [{"type": "tool_use", "id": "x", "name": "f", "input": []}]}]},
     "messages.0.content.0.input"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
     "messages.0.content.0.tool_use_id"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image"}]}, "system.0.type"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": "1"}, "top_k"),
    ({"stop_sequences": "a"}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
    ({"stop_sequences": ["a"], "stop": "b"}, "stop_sequences"),
    ({"stream": "yes"}, "stream"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
    ({"tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
    ({"tools": [{**TOOL, "input_schema": 5}]}, "tools.0.input_schema"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}},
     "output_config.format"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda v: str(v)[:50])
async def test_bad_bodies_name_the_field(direct, generator, fields, param):
    body = {"messages": HELLO, "max_tokens": 5, **fields}
    body = {k: v for k, v in body.items() if v is not None}
    error = error_of(await direct.post(ROUTE, json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"] or param == "messages"
    assert "max_completion_tokens" not in error["message"]
    assert not generator.started


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"a": "\xff"}'])
async def test_body_that_is_no_json_object(direct, body):
    for route in (ROUTE, COUNT):
        error = error_of(await direct.post(route, content=body), 400)
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after_s=4), 429, "rate_limit_error"),
        (NoWorker("none"), 503, "overloaded_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
async def test_failures_before_the_first_token(direct, generator, error, status, kind):
    generator.fail_at, generator.error = 0, error
    body = {"messages": HELLO, "max_tokens": 5, "stream": True}
    response = await direct.post(ROUTE, json=body)
    told = error_of(response, status)
    assert told["type"] == kind
    assert "secret" not in told["message"]
    assert response.headers.get("retry-after") == ("4" if status == 429 else None)


async def test_failure_in_mid_stream_is_an_event(direct, generator):
    generator.fail_at, generator.error = 3, WorkerLost("the worker is gone")
    last = (await events(direct))[-1]
    assert (last["type"], last["error"]["message"]) == ("error", "the worker is gone")


async def test_unknown_model(direct):
    body = {"model": "x", "messages": HELLO, "max_tokens": 5}
    error = error_of(await direct.post(ROUTE, json=body), 404)
    assert (error["type"], error["param"]) == ("not_found_error", "model")


class _Keys(ProcessState):
    """One key."""

    async def key_owner(self, key_hash: str) -> TenantRecord | None:
        return TenantRecord("acme") if key_hash == hash_key("baton-right") else None


async def test_the_key_may_come_as_x_api_key(generator, edge_config):
    metrics = Metrics()
    config = TenantsConfig(require_key=True)
    tenants = open_tenants(config, SloConfig(), shared=_Keys(), metrics=metrics)
    app = HttpApp(generator, metrics=metrics, config=edge_config, tenants=tenants)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        body = {"messages": HELLO, "max_tokens": 5}
        for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": "two words"}):
            for route in (ROUTE, COUNT):
                answer = await client.post(route, json=body, headers=headers)
                assert error_of(answer, 401)["type"] == "authentication_error"
        for headers in ({"x-api-key": "baton-right"}, {"authorization": "Bearer baton-right"}):
            assert (await client.post(ROUTE, json=body, headers=headers)).status_code == 200
        assert generator.started[-1].tenant == "acme"
        # Elsewhere that header means nothing.
        body = {"messages": HELLO}
        answer = await client.post(CHAT, json=body, headers={"x-api-key": "baton-right"})
        assert answer.status_code == 401
    app.close()


@pytest.fixture
async def sdk(edge):
    async with anthropic.AsyncAnthropic(
        base_url=edge.url, api_key="none", max_retries=0, timeout=10
    ) as client:
        yield client


async def test_anthropic_client(sdk, generator):
    message = await sdk.messages.create(model="tiny", max_tokens=50, messages=HELLO)
    assert message.content[0].text == "Hello, world"
    assert message.usage.cache_read_input_tokens > 0
    count = await sdk.messages.count_tokens(model="tiny", messages=HELLO)
    assert count.input_tokens == len(generator.started[0].prompt_token_ids)


async def test_anthropic_client_streams(sdk, generator):
    async with sdk.messages.stream(model="tiny", max_tokens=50, messages=HELLO) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == final.content[0].text == "Hello, world"
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 12)
    generator.reply = lambda request: "so " + CALL
    async with sdk.messages.stream(
        model="tiny", max_tokens=200, messages=HELLO, tools=[TOOL]
    ) as stream:
        final = await stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].input == {"a": 1}


async def test_anthropic_client_knows_the_errors(sdk, generator):
    with pytest.raises(anthropic.NotFoundError):
        await sdk.messages.create(model="x", max_tokens=5, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await sdk.messages.create(model="tiny", max_tokens=0, messages=HELLO)
    generator.fail_at, generator.error = 3, WorkerLost("the worker is gone")
    with pytest.raises(anthropic.APIStatusError, match="the worker is gone"):
        async with sdk.messages.stream(model="tiny", max_tokens=50, messages=HELLO) as stream:
            await stream.until_done()
