"""POST /v1/responses and what can be done with an answer, with a scripted dispatcher."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from baton.core.errors import NoWorker, WorkerLost
from baton.core.structured import StructuredKind
from baton.telemetry.metrics import Metrics
from services.router.admission.slo_config import SloConfig
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.http_app import HttpApp
from services.router.edge.responses_config import ResponsesConfig
from services.router.requests.generation import ModelCard
from services.router.shared.process_state import ProcessState
from services.router.tenants.tenants import open_tenants
from services.router.tenants.tenants_config import TenantsConfig

ROUTE, CHAT = "/v1/responses", "/v1/chat/completions"
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}
CHAT_TOOL = {"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(autouse=True)
def long_context(generator, tokenizer):
    # A token is a byte here, and a tool's definition has some hundreds.
    generator.models = lambda: [ModelCard("tiny", 2048, tokenizer, 0)]


async def create(client, given="hi", **fields) -> dict:
    response = await client.post(ROUTE, json={"input": given, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def events(client, given="hi", **fields) -> list[dict]:
    response = await client.post(ROUTE, json={"input": given, "stream": True, **fields})
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def text_of(response) -> str:
    return "".join(
        part["text"]
        for item in response["output"]
        if item["type"] == "message"
        for part in item["content"]
    )


def without_ids(response) -> dict:
    """What two answers to one request have in common."""
    kept = {k: v for k, v in response.items() if k not in ("id", "created_at", "completed_at")}
    kept["output"] = [
        {k: v for k, v in item.items() if k not in ("id", "call_id")} for item in kept["output"]
    ]
    return kept


async def chat_prompt(client, generator, messages, **fields) -> tuple[int, ...]:
    await client.post(CHAT, json={"messages": messages, **fields})
    return generator.started[-1].prompt_token_ids


async def test_answer(direct):
    response = await create(direct, metadata={"a": "b"}, max_output_tokens=5, user="u")
    assert response["object"] == "response"
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert text_of(response) == "Hello"
    assert response["metadata"] == {"a": "b"}
    assert response["error"] is None
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens"] == 5
    assert usage["input_tokens_details"]["cached_tokens"] == usage["input_tokens"] // 2


async def test_text_and_prompt_are_those_of_the_chat_route(direct, generator):
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
    whole = await create(direct, instructions="short", seed=3)
    asked = generator.started[-1]
    streamed = await events(direct, instructions="short", seed=3)
    chat = (await direct.post(CHAT, json={"messages": messages, "seed": 3})).json()
    assert asked.prompt_token_ids == generator.started[-1].prompt_token_ids
    assert asked.sampling == generator.started[-1].sampling
    text = chat["choices"][0]["message"]["content"]
    assert text_of(whole) == text
    deltas = [e["delta"] for e in streamed if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text
    assert len(deltas) == len(text)
    assert without_ids(streamed[-1]["response"]) == without_ids(whole)


async def test_events_of_a_text(direct):
    found = await events(direct, max_output_tokens=2)
    assert [event["type"] for event in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert found[2]["item"]["content"] == []
    assert found[-2]["item"]["status"] == "incomplete"
    assert found[-2]["item"] == found[-1]["response"]["output"][0]


async def test_empty_output_is_an_empty_text(direct, generator):
    generator.reply = lambda request: ""
    whole, streamed = await create(direct), await events(direct)
    assert whole["output"][0]["content"][0]["text"] == ""
    assert without_ids(streamed[-1]["response"]) == without_ids(whole)


async def test_calls_of_tools(direct, generator):
    generator.reply = lambda request: "thinking" + CALL
    whole = await create(direct, tools=[TOOL])
    message, call = whole["output"]
    assert message["content"][0]["text"] == "thinking"
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call", "f", {"a": 1},
    )  # fmt: skip
    streamed = await events(direct, tools=[TOOL])
    assert without_ids(streamed[-1]["response"]) == without_ids(whole)
    parts = [e["delta"] for e in streamed if e["type"].endswith("arguments.delta")]
    (done,) = [e for e in streamed if e["type"] == "response.function_call_arguments.done"]
    assert "".join(parts) == done["arguments"] == call["arguments"]
    prompt = generator.started[-1].prompt_token_ids
    hello = [{"role": "user", "content": "hi"}]
    assert prompt == await chat_prompt(direct, generator, hello, tools=[CHAT_TOOL])


async def test_a_named_tool_is_forced(direct, generator):
    generator.reply = lambda request: '{"a": 2}'
    choice = {"type": "function", "name": "f"}
    (call,) = (await create(direct, tools=[TOOL], tool_choice=choice))["output"]
    assert json.loads(call["arguments"]) == {"a": 2}
    assert generator.started[-1].sampling.structured.kind is StructuredKind.JSON_SCHEMA


async def test_items_become_the_messages_of_the_chat_route(direct, generator):
    items = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "well"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2",
         "output": [{"type": "input_text", "text": "two"}]},
    ]  # fmt: skip
    await create(direct, items)
    prompt = generator.started[-1].prompt_token_ids
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": arguments}}
        for i, arguments in ((1, '{"a": 1}'), (2, "{}"))
    ]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "well", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": "two"},
    ]
    assert prompt == await chat_prompt(direct, generator, messages)


async def test_structured_text(direct, generator):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = await create(direct, text=text)
    assert json.loads(generator.started[-1].sampling.structured.text) == schema
    assert response["text"]["format"]["schema"] == schema
    await create(direct, text={"format": {"type": "json_object"}})
    assert generator.started[-1].sampling.structured.kind is StructuredKind.JSON_OBJECT


async def test_logprobs(direct):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole, streamed = await create(direct, **fields), await events(direct, **fields)
    entries = whole["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in entries] == list("Hello, world")
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    deltas = [e["logprobs"] for e in streamed if e["type"] == "response.output_text.delta"]
    assert [entry for found in deltas for entry in found] == entries
    assert without_ids(streamed[-1]["response"]) == without_ids(whole)


async def test_conversation_goes_on(direct, generator):
    first = await create(direct, "one", instructions="first only")
    second = await create(direct, "two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    turns = [("user", "one"), ("assistant", "Hello, world"), ("user", "two")]
    messages = [{"role": role, "content": text} for role, text in turns]
    prompt = generator.started[-1].prompt_token_ids
    assert prompt == await chat_prompt(direct, generator, messages)


async def test_conversation_goes_on_behind_a_call(direct, generator):
    generator.reply = lambda request: CALL
    first = (await events(direct, tools=[TOOL]))[-1]["response"]
    call_id = first["output"][0]["call_id"]
    output = [{"type": "function_call_output", "call_id": call_id, "output": "7"}]
    await create(direct, output, tools=[TOOL], previous_response_id=first["id"])
    prompt = generator.started[-1].prompt_token_ids
    call = {"id": call_id, "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "7"},
    ]
    assert prompt == await chat_prompt(direct, generator, messages, tools=[CHAT_TOOL])


async def test_retrieve_and_delete(direct):
    response = await create(direct)
    path = f"{ROUTE}/{response['id']}"
    assert (await direct.get(path)).json() == response
    assert (await direct.delete(path)).json()["deleted"] is True
    assert (await direct.get(path)).status_code == 404
    assert (await direct.delete(path)).status_code == 404


async def test_unknown_fields_are_tolerated(direct):
    await create(direct, reasoning={"effort": "low", "summary": "auto"}, service_tier="auto",
                 truncation="auto", store=None, made_up={"a": 1})  # fmt: skip


async def test_what_is_not_stored_cannot_be_fetched(direct):
    response = await create(direct, store=False)
    assert (await direct.get(f"{ROUTE}/{response['id']}")).status_code == 404
    body = {"input": "a", "previous_response_id": response["id"]}
    answer = await direct.post(ROUTE, json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "previous_response_id"


async def until_ended(client, response_id) -> dict:
    async with asyncio.timeout(5):
        while True:
            response = (await client.get(f"{ROUTE}/{response_id}")).json()
            if response["status"] != "in_progress":
                return response
            await asyncio.sleep(0.01)


async def test_background(direct):
    response = await create(direct, background=True)
    assert response["status"] == "in_progress"
    ended = await until_ended(direct, response["id"])
    assert (ended["status"], text_of(ended)) == ("completed", "Hello, world")
    path = f"{ROUTE}/{response['id']}/cancel"
    assert (await direct.post(path)).json() == ended


async def test_cancel_ends_the_generation(direct, generator):
    generator.step_s = 0.05
    response = await create(direct, background=True)
    await asyncio.sleep(0.1)
    answer = await direct.post(f"{ROUTE}/{response['id']}/cancel")
    assert answer.json()["status"] == "cancelled"
    assert generator.closed_early == [response["id"]]
    assert (await direct.get(f"{ROUTE}/{response['id']}")).json()["status"] == "cancelled"
    body = {"input": "a", "previous_response_id": response["id"]}
    assert (await direct.post(ROUTE, json=body)).status_code == 400


async def test_cancel_before_the_first_step_leaves_nothing(direct, generator):
    ids = [(await create(direct, background=True))["id"] for _ in range(3)]
    answers = await asyncio.gather(*(direct.post(f"{ROUTE}/{i}/cancel") for i in ids))
    assert {a.json()["status"] for a in answers} <= {"cancelled", "completed"}
    assert (await direct.get("/load")).json() == {"server_load": 0}


async def test_background_that_fails_says_so(direct, generator):
    generator.fail_at, generator.error = 2, NoWorker("none left")
    response = await create(direct, background=True)
    ended = await until_ended(direct, response["id"])
    assert ended["status"] == "failed"
    assert ended["error"] == {"code": "server_error", "message": "none left"}


async def test_background_is_bounded(generator, serve_edge):
    generator.step_s = 0.05
    config = EdgeConfig(responses=ResponsesConfig(max_background=1), stop_grace_s=0.05)
    async with (
        serve_edge(generator, config) as edge,
        openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0) as sdk,
    ):
        await sdk.responses.create(model="tiny", input="a", background=True)
        with pytest.raises(openai.RateLimitError, match="at most 1"):
            await sdk.responses.create(model="tiny", input="a", background=True)
    # The stop of the edge ended the one that ran.
    assert len(generator.started) == len(generator.closed_early) == 1


async def test_stop_ends_what_runs_in_the_background(generator, edge_config):
    generator.step_s = 0.05
    app = HttpApp(generator, metrics=Metrics(), config=edge_config)
    response = await create_on(app)
    await asyncio.sleep(0.1)
    app.end_all()
    await generator.until_idle(1)
    assert generator.closed_early == [response["id"]]
    app.close()


async def create_on(app) -> dict:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        return await create(client, background=True)


async def test_only_what_runs_in_the_background_can_be_cancelled(direct):
    response = await create(direct)
    answer = await direct.post(f"{ROUTE}/{response['id']}/cancel")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_id"


async def test_failure_before_the_first_token_has_its_status(direct, generator):
    generator.fail_at, generator.error = 0, NoWorker("none")
    answer = await direct.post(ROUTE, json={"input": "a", "stream": True})
    assert answer.status_code == 503


async def test_failure_in_mid_stream_is_an_event(direct, generator):
    generator.fail_at, generator.error = 3, WorkerLost("the worker is gone")
    last = (await events(direct))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "the worker is gone"
    stored = (await direct.get(f"{ROUTE}/{last['response']['id']}")).json()
    assert stored["status"] == "failed"


async def test_leaving_client_cancels(edge, client, generator):
    generator.step_s = 0.02
    async with client.stream("POST", ROUTE, json={"input": "a", "stream": True}) as response:
        async for _ in response.aiter_lines():
            break
    await generator.until_idle(1, timeout_s=2)
    assert generator.closed_early


async def test_tenants_do_not_see_each_other(generator, edge_config):
    metrics = Metrics()
    config = TenantsConfig(trust_tenant_header=True)
    tenants = open_tenants(config, SloConfig(), shared=ProcessState(), metrics=metrics)
    app = HttpApp(generator, metrics=metrics, config=edge_config, tenants=tenants)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://edge") as client:
        client.headers["x-tenant-id"] = "one"
        response = await create(client, background=True)
        path = f"{ROUTE}/{response['id']}"
        client.headers["x-tenant-id"] = "two"
        assert (await client.get(path)).status_code == 404
        assert (await client.delete(path)).status_code == 404
        assert (await client.post(f"{path}/cancel")).status_code == 404
        body = {"input": "a", "previous_response_id": response["id"]}
        assert (await client.post(ROUTE, json=body)).status_code == 404
        client.headers["x-tenant-id"] = "one"
        assert (await until_ended(client, response["id"]))["status"] == "completed"
    app.close()


ITEM = {"role": "user", "content": "a"}
BAD = [
    ({}, "input"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": ""}, None),
    ({"input": ["a"]}, "input.0"),
    ({"input": [ITEM, {"role": "king", "content": "a"}]}, "input.1.role"),
    ({"input": [{"role": "user", "content": 5}]}, "input.0.content"),
    ({"input": [{"role": "user", "content": [5]}]}, "input.0.content.0"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input.0.content.0.text"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
     "input.0.content.0.type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"type": "reasoning"}]}, "input"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
     "input.0.arguments"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[]"}]},
     "input.0.arguments"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input.0.output"),
    ({"input": "x" * 5000}, "input"),
    ({"input": "a", "instructions": 5}, "instructions"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "a", "max_output_tokens": 10**9}, "max_output_tokens"),
    ({"input": "a", "max_output_tokens": "5"}, "max_output_tokens"),
    ({"input": "a", "temperature": -1}, "temperature"),
    ({"input": "a", "top_p": 2}, "top_p"),
    ({"input": "a", "top_logprobs": 21}, "top_logprobs"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"input": "a", "tools": [{"type": "function"}]}, "tools.0.name"),
    ({"input": "a", "tools": [{**TOOL, "name": "a b"}]}, "tools.0.name"),
    ({"input": "a", "tool_choice": "required"}, "tool_choice"),
    ({"input": "a", "tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}},
     "tool_choice"),
    ({"input": "a", "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"input": "a", "text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": "no"}}}},
     "text.format"),
    ({"input": "a", "metadata": {"a": 5}}, "metadata.a"),
    ({"input": "a", "metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"input": "a", "metadata": {"a": "x" * 600}}, "metadata.a"),
    ({"input": "a", "previous_response_id": 5}, "previous_response_id"),
    ({"input": "a", "store": "yes"}, "store"),
    ({"input": "a", "background": True, "stream": True}, "background"),
    ({"input": "a", "background": True, "store": False}, "background"),
    ({"input": "a", "conversation": "c"}, "conversation"),
    ({"input": "a", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "a", "truncation": "some"}, "truncation"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), [b for b in BAD if b[1]], ids=lambda v: str(v)[:50])
async def test_bad_bodies_name_the_field(direct, generator, body, param):
    response = await direct.post(ROUTE, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "messages" not in error["message"]
    assert not generator.started


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", ROUTE, 405),
        ("PUT", f"{ROUTE}/x", 405),
        ("GET", f"{ROUTE}/x/cancel", 405),
        ("GET", f"{ROUTE}/x", 404),
        ("GET", f"{ROUTE}/x/y", 404),
        ("POST", f"{ROUTE}/x/cancel", 404),
        ("GET", f"{ROUTE}/" + "x" * 3000, 404),
    ],
)
async def test_wrong_routes(direct, method, path, status):
    response = await direct.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]


async def test_a_stored_response_comes_whole(direct):
    response = await create(direct)
    answer = await direct.get(f"{ROUTE}/{response['id']}?stream=true")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")


async def test_unknown_model(direct):
    answer = await direct.post(ROUTE, json={"model": "x", "input": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


@pytest.fixture
async def sdk(edge):
    async with openai.AsyncOpenAI(
        base_url=f"{edge.url}/v1", api_key="none", max_retries=0, timeout=10
    ) as client:
        yield client


async def test_openai_client(sdk, generator):
    response = await sdk.responses.create(model="tiny", input="hi")
    assert response.output_text == "Hello, world"
    assert response.usage.input_tokens_details.cached_tokens > 0
    assert (await sdk.responses.retrieve(response.id)).output_text == "Hello, world"
    await sdk.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(response.id)
    generator.step_s = 0.05
    running = await sdk.responses.create(model="tiny", input="hi", background=True)
    assert (await sdk.responses.cancel(running.id)).status == "cancelled"


async def test_openai_client_streams(sdk):
    text = ""
    async for event in await sdk.responses.create(model="tiny", input="hi", stream=True):
        if event.type == "response.output_text.delta":
            text += event.delta
    assert (text, event.type) == ("Hello, world", "response.completed")
    async with sdk.responses.stream(model="tiny", input="hi") as stream:
        final = await stream.get_final_response()
    assert final.output_text == "Hello, world"


async def test_openai_client_streams_calls(sdk, generator):
    generator.reply = lambda request: "so " + CALL
    async with sdk.responses.stream(model="tiny", input="hi", tools=[TOOL]) as stream:
        final = await stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert json.loads(final.output[1].arguments) == {"a": 1}
