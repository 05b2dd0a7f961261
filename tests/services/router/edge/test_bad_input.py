"""Whatever a client sends, it gets a 4xx that names the problem, and nothing is started."""

from __future__ import annotations

import asyncio
import json

import pytest

from baton.core.errors import DeadlineExceeded, NoWorker, Overloaded, WorkerLost
from baton.core.metrics import REJECTED

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
JSON_HEADERS = {"content-type": "application/json"}


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


NOT_OBJECTS = {
    "broken": b'{"model": "tiny", ',
    "trailing": b'{"prompt": "a"} x',
    "empty": b"",
    "list": b"[1]",
    "string": b'"text"',
    "number": b"12",
    "null": b"null",
    "invalid utf-8": b'{"prompt": "\xff\xfe"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "deep list": b"[" * 20_000,
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "deep unknown field": b'{"prompt": "a", "x": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "overflow": b'{"prompt": "a", "temperature": 1e999}',
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("body", NOT_OBJECTS.values(), ids=NOT_OBJECTS.keys())
async def test_body_that_is_no_json_object(direct, generator, route, body):
    error = error_of(await direct.post(route, content=body, headers=JSON_HEADERS), 400)
    assert error["type"] == "invalid_request_error"
    assert not generator.started


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_content_type_does_not_matter(direct, content_type):
    body = json.dumps({"prompt": "a"}).encode()
    response = await direct.post(COMPLETIONS, content=body, headers={"content-type": content_type})
    assert response.status_code == 200


BAD_SAMPLING = {
    "temperature": [-0.1, 101, "0.5", True, [], 10**30],
    "top_p": [0, -1, 1.01, "1"],
    "top_k": [-2, 1.5, "5", True, 10**30],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, 101],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1, {}],
    "logit_bias": [{"5": 101}, {"5": -101}, {"x": 1}, {"-1": 1}, {"9999": 1}, {"5": "1"}, [1], 3],
    "seed": [2**63, 10**40, 1.5, "1"],
    "n": [0, -1, 129, 1.5, "2"],
    "max_tokens": [0, -1, 1.5, "5", True, 10**30, 2**63],
    "min_tokens": [-1, 200_000, "1"],
    "stop": [5, [5], {"a": 1}, [None], "", [""], ["x"] * 17, "x" * 2000],
    "stop_token_ids": [[-1], [258], ["1"], 5, [True], [10**30], list(range(257))],
    "ignore_eos": ["yes", 1],
    "stream": ["true", 1],
    "model": [5, ["tiny"], {}],
    "stream_options": [{"include_usage": True}, 5],
    "response_format": [
        {"type": "xml"},
        "text",
        {},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
    ],
    "structured_outputs": [
        5,
        {"json": 5},
        {"json": "{"},
        {"regex": "("},
        {"choice": []},
        {"choice": ["a", ""]},
        {"choice": "ab"},
        {"grammar": "?"},
        {"regex": "a", "choice": ["a"]},
        {"structural_tag": {}},
    ],
    "guided_json": [5, "{", {"type": "nothing"}],
    "guided_regex": ["(", 5],
    "guided_choice": [[], [5]],
    "guided_grammar": ["?", {}],
    "allowed_token_ids": [[-1], [258], ["1"], 5],
    "bad_words": [[""], [" "], "a", [5], ["x"] * 200],
    "prompt_logprobs": [-1, 21, "1"],
    "truncate_prompt_tokens": [0, -2, 256, "5"],
    "skip_special_tokens": ["no", 0],
    "include_stop_str_in_output": ["yes", 1],
    "return_token_ids": [1],
    "return_tokens_as_token_ids": ["x"],
    "cache_salt": [5, "x" * 300],
    "user": [5],
}
CASES = [(name, value) for name, values in BAD_SAMPLING.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}={str(v)[:20]}" for n, v in CASES])
async def test_bad_field_is_named(direct, generator, name, value):
    base = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "a"}}
    for route, body in base.items():
        error = error_of(await direct.post(route, json={**body, name: value}), 400)
        assert error["param"].split(".")[0] == name
        assert name in error["message"]
        assert len(error["message"]) < 400
    assert not generator.started


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{}]),
        ("suffix", "end"),
        ("modalities", ["text", "audio"]),
        ("use_beam_search", True),
        ("chat_template", "{{ messages }}"),
    ],
)
async def test_unsupported_field_is_refused_by_name(direct, name, value):
    for route, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
        error = error_of(await direct.post(route, json={**body, name: value}), 400)
        assert error["param"] == name
        assert "not supported" in error["message"]


TOOL = {"type": "function", "function": {"name": "f"}}
DEEP = json.loads('{"a":' * 500 + "1" + "}" * 500)
DEEP_TOOL = "tools.0.function.parameters"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": "x"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": 5, "tools": [TOOL]}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
            "tool_choice",
        ),
        ({"tool_choice": {"type": "function"}, "tools": [TOOL]}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "no"}}}
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"x": "y" * 70_000}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
        ({"chat_template_kwargs": DEEP}, "chat_template_kwargs"),
        ({"guided_json": DEEP}, "guided_json"),
        ({"tools": [{**TOOL, "function": {"name": "f", "parameters": DEEP}}]}, DEEP_TOOL),
        (
            {
                "tools": [{**TOOL, "function": {"name": "f", "parameters": DEEP}}],
                "tool_choice": "required",
            },
            DEEP_TOOL,
        ),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        (
            {
                "response_format": {"type": "json_object"},
                "structured_outputs": {"regex": "a"},
            },
            "structured_outputs",
        ),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_bad_chat_field_is_named(direct, generator, fields, param):
    error = error_of(await direct.post(CHAT, json={"messages": HELLO, **fields}), 400)
    assert error["param"] == param
    assert len(error["message"]) < 600
    assert not generator.started


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"echo": "yes"}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"add_special_tokens": 3}, "add_special_tokens"),
    ],
)
async def test_bad_completion_field_is_named(direct, generator, fields, param):
    error = error_of(await direct.post(COMPLETIONS, json={"prompt": "a", **fields}), 400)
    assert error["param"] == param
    assert not generator.started


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hi", "messages"),
        ([{}] * 17_000, "messages"),
        ([5], "messages.0"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "king", "content": "x"}], "messages.0.role"),
        ([{"role": 5, "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": {}}], "messages.0.content"),
        ([*HELLO, {"role": "user", "content": [5]}], "messages.1.content.0"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages.0.content.0",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
            "messages.0.tool_calls.0.function",
        ),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}],
                }
            ],
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
async def test_bad_messages(direct, messages, param):
    error = error_of(await direct.post(CHAT, json={"messages": messages}), 400)
    assert error["param"] == param


async def test_messages_are_required(direct):
    assert error_of(await direct.post(CHAT, json={}), 400)["message"] == "messages is required"


@pytest.mark.parametrize(
    "prompt",
    [None, "", [], [""], [[]], 5, {}, [1, "a"], ["a", 1], [[1], "a", None], [True], [1.5], [-1],
     [258], [2**40], [10**30], [[1], [-1]], [[["a"]]], ["a"] * 257],
)  # fmt: skip
async def test_bad_prompt(direct, generator, prompt):
    error = error_of(await direct.post(COMPLETIONS, json={"prompt": prompt}), 400)
    assert error["param"].split(".")[0] == "prompt"
    assert not generator.started


async def test_token_id_out_of_vocabulary_names_value_and_limit(direct):
    error = error_of(await direct.post(COMPLETIONS, json={"prompt": [1, 258]}), 400)
    assert "258" in error["message"]
    assert "257" in error["message"]


@pytest.mark.parametrize("prompt", ["x" * 256, [1] * 256, "x" * 150_000])
async def test_prompt_over_the_context(direct, prompt):
    error = error_of(await direct.post(COMPLETIONS, json={"prompt": prompt}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "256" in error["message"]


async def test_chat_over_the_context(direct):
    messages = [{"role": "user", "content": "x" * 300}]
    error = error_of(await direct.post(CHAT, json={"messages": messages}), 400)
    assert error["code"] == "context_length_exceeded"


async def test_prompt_and_output_must_fit_together(direct):
    body = {"prompt": [1] * 200}
    error = error_of(await direct.post(COMPLETIONS, json={**body, "max_tokens": 57}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "max_tokens <= 56" in error["message"]
    assert (await direct.post(COMPLETIONS, json={**body, "max_tokens": 56})).status_code == 200


async def test_last_token_of_the_context_can_be_used(direct, generator):
    generator.reply = lambda request: "xxxx"
    response = await direct.post(COMPLETIONS, json={"prompt": [1] * 255})
    assert response.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_unknown_model_is_not_found(direct, route):
    body = {"model": "gpt-none", "messages": HELLO, "prompt": "a"}
    error = error_of(await direct.post(route, json=body), 404)
    assert error["code"] == "model_not_found"
    assert "tiny" in error["message"]


async def test_no_model_yet_is_unavailable(direct, generator):
    generator.names = ()
    assert error_of(await direct.post(COMPLETIONS, json={"prompt": "a"}), 503)
    assert (await direct.get("/v1/models")).json()["data"] == []


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": 3}, "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
async def test_fields_of_one_route(direct, route, fields, param):
    body = {"messages": HELLO, "prompt": "a", **fields}
    assert error_of(await direct.post(route, json=body), 400)["param"] == param


async def test_too_many_choices(direct):
    body = {"prompt": ["a"] * 100, "n": 3}
    assert error_of(await direct.post(COMPLETIONS, json=body), 400)["param"] == "n"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
async def test_wrong_method(direct, method):
    response = await direct.request(method, COMPLETIONS)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        error_of(response, 405)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/chat", "/v1/completions/x", "/%00", "/é"])
async def test_unknown_route(direct, path):
    error_of(await direct.get(path), 404)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Overloaded("no room", retry_after_s=2.2), 429),
        (NoWorker("no worker"), 503),
        (WorkerLost("lost"), 503),
        (DeadlineExceeded("too late"), 504),
        (ZeroDivisionError("/secret/path"), 500),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_failure_before_the_first_token_is_a_status(
    direct, generator, error, status, is_stream
):
    generator.fail_at, generator.error = 0, error
    response = await direct.post(COMPLETIONS, json={"prompt": "a", "stream": is_stream})
    body = error_of(response, status)
    assert "/secret" not in body["message"]
    if status == 429:
        assert response.headers["retry-after"] == "3"


@pytest.mark.parametrize("error", [WorkerLost("lost"), ValueError("/secret/path")])
async def test_failure_after_the_first_token_is_an_event(direct, generator, error):
    generator.fail_at, generator.error = 3, error
    response = await direct.post(CHAT, json={"messages": HELLO, "stream": True})
    assert response.status_code == 200
    *_, last = response.text.removesuffix("\n\n").split("\n\n")
    assert set(json.loads(last.removeprefix("data: "))["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }
    assert "[DONE]" not in response.text
    assert "/secret" not in response.text
    assert 'finish_reason":"' not in response.text


async def test_one_failing_prompt_cancels_its_batch(direct, generator):
    generator.fail_at, generator.error = 2, WorkerLost("lost")
    generator.step_s = 0.001
    error_of(await direct.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}), 503)
    await generator.until_idle(3)
    assert len(generator.closed_early) == 3


async def test_rejections_are_counted_once_by_status(client, edge):
    await client.post(COMPLETIONS, json={"prompt": ""})
    await client.post(COMPLETIONS, json={"prompt": "a", "model": "x"})
    edge.generator.fail_at, edge.generator.error = 0, Overloaded("full")
    await client.post(COMPLETIONS, json={"prompt": "a"})
    rendered = edge.metrics.render().decode()
    assert f'{REJECTED.name}{{status="400"}} 1.0' in rendered
    assert f'{REJECTED.name}{{status="404"}} 1.0' in rendered
    assert f'{REJECTED.name}{{status="429"}} 1.0' in rendered


async def test_client_that_left_is_no_rejection(edge):
    edge.generator.step_s = 30
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    body = json.dumps({"prompt": "a"}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: e\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    while not edge.generator.started:
        await asyncio.sleep(0.005)
    writer.transport.abort()
    await edge.generator.until_idle(1)
    lines = edge.metrics.render().decode().splitlines()
    counts = [line for line in lines if line.startswith(f"{REJECTED.name}{{")]
    assert all(line.endswith(" 0.0") for line in counts)


async def test_service_lives_on_after_bad_input(client):
    for body in NOT_OBJECTS.values():
        error_of(await client.post(CHAT, content=body, headers=JSON_HEADERS), 400)
    assert (await client.post(COMPLETIONS, json={"prompt": "a"})).status_code == 200
