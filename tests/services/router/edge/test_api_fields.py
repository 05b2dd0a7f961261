"""What fields of a body make of the request and of its answer, with a scripted dispatcher."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from openai import AsyncOpenAI

from baton.core.structured import StructuredKind
from services.router.openai_api import jobs
from services.router.requests.generation import ModelCard

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(autouse=True)
def long_context(generator, tokenizer):
    # A token is a byte here, and a tool's definition has some hundreds.
    generator.models = lambda: [ModelCard("tiny", 2048, tokenizer, 0)]


async def chat(direct, **fields) -> dict:
    response = await direct.post(CHAT, json={"messages": HELLO, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def events(direct, path, **body) -> list[dict]:
    response = await direct.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_call_is_found_and_ends_the_answer(direct, generator):
    generator.reply = lambda request: f"Let me see.\n{CALL}"
    choice = (await chat(direct, tools=[TOOL]))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}


async def test_streamed_call_is_that_of_the_answer(direct, generator):
    generator.reply = lambda request: CALL
    chunks = await events(direct, CHAT, messages=HELLO, tools=[TOOL], logprobs=True)
    choices = [c["choices"][0] for c in chunks]
    deltas = [d for c in choices for d in c["delta"].get("tool_calls", [])]
    assert deltas[0]["function"] == {"name": "f", "arguments": ""}
    assert "".join(d["function"]["arguments"] for d in deltas) == '{"a": 1}'
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(c["delta"].get("content") for c in choices)
    entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert len(entries) == len(CALL)


async def test_second_call_is_dropped_where_one_is_wanted(direct, generator):
    generator.reply = lambda request: f"{CALL}\n{CALL}"
    for fields, num_calls in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        answer = await chat(direct, tools=[TOOL], **fields)
        assert len(answer["choices"][0]["message"]["tool_calls"]) == num_calls
        body = {"messages": HELLO, "tools": [TOOL], **fields}
        chunks = await events(direct, CHAT, **body)
        deltas = [d for c in chunks for d in c["choices"][0]["delta"].get("tool_calls", [])]
        assert len({d["index"] for d in deltas}) == num_calls


async def test_tools_are_spelled_out_unless_none_may_be_called(direct, generator, tokenizer):
    for choice, is_there in (("auto", True), ("none", False)):
        await chat(direct, tools=[TOOL], tool_choice=choice)
        prompt = tokenizer.decode(generator.started[-1].prompt_token_ids)
        assert ('{"name": "f"' in prompt) is is_there


async def test_forced_calls_ask_for_a_structure(direct, generator):
    generator.reply = lambda request: '[{"name": "f", "parameters": {"a": 1}}]'
    choice = (await chat(direct, tools=[TOOL], tool_choice="required"))["choices"][0]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    schema = json.loads(generator.started[-1].sampling.structured.text)
    assert schema["type"] == "array" and schema["minItems"] == 1
    generator.reply = lambda request: '{"a": 1}'
    named = {"type": "function", "function": {"name": "f"}}
    choice = (await chat(direct, tools=[TOOL], tool_choice=named))["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert choice["finish_reason"] == "stop"
    schema = json.loads(generator.started[-1].sampling.structured.text)
    assert schema == TOOL["function"]["parameters"]


async def test_sdk_reads_streamed_calls(client, edge, generator):
    generator.reply = lambda request: f"Well. {CALL}"
    async with (
        AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="x") as sdk,
        sdk.chat.completions.stream(
            model="tiny", messages=HELLO, tools=[TOOL], max_tokens=500
        ) as stream,
    ):
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "Well."
    assert message.tool_calls[0].function.arguments == '{"a": 1}'


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, StructuredKind.JSON_OBJECT, ""),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            StructuredKind.JSON_SCHEMA,
            "{}",
        ),
        ({"structured_outputs": {"json": {"const": 1}}}, StructuredKind.JSON_SCHEMA, '{"const":1}'),
        ({"structured_outputs": {"json_object": True}}, StructuredKind.JSON_OBJECT, ""),
        ({"guided_json": '{"const":1}'}, StructuredKind.JSON_SCHEMA, '{"const":1}'),
        ({"guided_regex": "a+"}, StructuredKind.REGEX, "a+"),
        ({"guided_choice": ["a", "b"]}, StructuredKind.CHOICE, '["a", "b"]'),
        ({"guided_grammar": 'root ::= "a"'}, StructuredKind.GRAMMAR, 'root ::= "a"'),
    ],
)
async def test_forms_of_output_under_all_their_names(direct, generator, fields, kind, text):
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
        assert (await direct.post(path, json={**body, **fields})).status_code == 200
        spec = generator.started[-1].sampling.structured
        assert (spec.kind, spec.text) == (kind, text)


async def test_text_is_no_form(direct, generator):
    await chat(direct, response_format={"type": "text"})
    assert generator.started[0].sampling.structured is None


async def test_echo_alone_generates_nothing_to_see(direct, generator):
    body = {"prompt": "abc", "echo": True, "max_tokens": 0}
    answer = (await direct.post(COMPLETIONS, json=body)).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert generator.started[0].sampling.max_tokens == 1
    chunks = await events(direct, COMPLETIONS, **body)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "abc"


async def test_echoed_log_probabilities_ask_for_those_of_the_prompt(direct, generator):
    body = {"prompt": "abc", "echo": True, "logprobs": 3}
    await direct.post(COMPLETIONS, json=body)
    assert generator.started[0].sampling.prompt_logprobs == 3


async def test_echo_of_token_ids_is_their_text(direct, tokenizer):
    ids = tokenizer.encode("héé ", add_special_tokens=False)
    answer = (await direct.post(COMPLETIONS, json={"prompt": [ids, ids], "echo": True})).json()
    assert [c["text"] for c in answer["choices"]] == ["héé Hello, world"] * 2


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_token_ids_of_stream_and_answer(direct, tokenizer, path):
    body = {"messages": HELLO} if path == CHAT else {"prompt": "abc"}
    body["return_token_ids"] = True
    answer = (await direct.post(path, json=body)).json()
    wanted = tokenizer.encode("Hello, world", add_special_tokens=False)
    assert answer["choices"][0]["token_ids"] == wanted
    prompt = (answer if path == CHAT else answer["choices"][0])["prompt_token_ids"]
    chunks = await events(direct, path, **body)
    choices = [c["choices"][0] for c in chunks]
    assert [i for c in choices for i in c.get("token_ids", [])] == wanted
    holders = chunks if path == CHAT else choices
    assert [h["prompt_token_ids"] for h in holders if "prompt_token_ids" in h] == [prompt]


async def test_offsets_are_those_of_the_characters(direct, generator):
    generator.reply = lambda request: "a漢b"
    body = {"prompt": "x", "logprobs": 0}
    arrays = (await direct.post(COMPLETIONS, json=body)).json()["choices"][0]["logprobs"]
    assert arrays["text_offset"] == [0, 1, 1, 1, 2]
    chunks = await events(direct, COMPLETIONS, **body)
    parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [i for part in parts for i in part["text_offset"]] == arrays["text_offset"]


async def test_continued_message_ends_the_prompt(direct, generator, tokenizer):
    messages = [*HELLO, {"role": "assistant", "content": "I am "}]
    await chat(direct, messages=messages, continue_final_message=True)
    prompt = tokenizer.decode(generator.started[0].prompt_token_ids)
    assert prompt == "[user]hi[assistant]I am "
    await chat(direct, messages=messages, add_generation_prompt=False)
    assert generator.started[1].prompt_token_ids == generator.started[0].prompt_token_ids


async def test_truncation_keeps_the_end(direct, generator):
    for prompt in ("abcdef", [1, 2, 3, 4, 5, 6], "x" * 5000):
        body = {"prompt": prompt, "truncate_prompt_tokens": 2}
        assert (await direct.post(COMPLETIONS, json=body)).status_code == 200
        assert len(generator.started[-1].prompt_token_ids) == 2
    assert generator.started[1].prompt_token_ids == (5, 6)


async def test_masses_of_forms_to_check_are_turned_away(direct, monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(jobs, "validate_structured", lambda spec: may_end.wait(20))
    monkeypatch.setattr(jobs, "MAX_CHECKS", 3)
    asked = [
        asyncio.create_task(
            direct.post(CHAT, json={"messages": HELLO, "guided_regex": f"c{{{i + 1}}}"})
        )
        for i in range(5)
    ]
    done, _ = await asyncio.wait(asked, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert all(task.result().status_code == 429 for task in done)
    may_end.set()
    statuses = sorted([(await task).status_code for task in asked])
    assert statuses == [200, 200, 200, 429, 429]
    assert (await chat(direct, guided_regex="d"))["choices"]


async def test_same_structure_is_checked_once(direct, generator, monkeypatch):
    seen = []
    monkeypatch.setattr(jobs, "validate_structured", seen.append)
    for _ in range(3):
        await chat(direct, guided_regex="b+")
    assert len(seen) == 1
