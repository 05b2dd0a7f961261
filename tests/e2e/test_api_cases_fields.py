"""What clients expect of tools, forms of output, prompts and vLLM's fields, by case number of the
list of cases."""

from __future__ import annotations

import json
import math

import jsonschema
import pytest

from api_calls import (
    CHAT,
    COMPLETIONS,
    HELLO,
    calls_of,
    chat,
    chat_body,
    choices_of,
    complete,
    completion_body,
    refused,
    stream,
    text_of,
)
from running_system import RunningSystem

pytestmark = pytest.mark.model

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS},
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {
    "type": "object", "properties": {"zone": {"enum": ["UTC"]}}, "required": ["zone"],
    "additionalProperties": False}}}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "w", "schema": PARAMETERS}}


def text(answer: dict, index: int = 0) -> str:
    choice = answer["choices"][index]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_case_47_named_tool(client):
    body = chat_body(tools=[WEATHER, CLOCK], tool_choice=NAMED, max_tokens=64)
    choice = client.post(CHAT, json=body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and choice["finish_reason"] == "stop"
    jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)
    assert calls_of(stream(client, CHAT, body)) == [call["function"]]


def test_case_47_required_tool(client):
    body = chat_body(
        tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False, max_tokens=96
    )
    choice = client.post(CHAT, json=body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    own = {t["function"]["name"]: t["function"]["parameters"] for t in (WEATHER, CLOCK)}
    jsonschema.validate(json.loads(call["function"]["arguments"]), own[call["function"]["name"]])
    chunks = stream(client, CHAT, body)
    assert calls_of(chunks) == [call["function"]]
    assert choices_of(chunks)[-1]["finish_reason"] == "tool_calls"


def test_case_47_auto_none_and_round_trip(client):
    auto = chat(client, tools=[WEATHER], max_tokens=24)
    assert auto["usage"]["prompt_tokens"] > chat(client)["usage"]["prompt_tokens"]
    none = chat(client, tools=[WEATHER], tool_choice="none")
    assert none["choices"][0]["message"] == chat(client)["choices"][0]["message"]
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 1}'},
    }
    back = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    assert chat(client, messages=back, tools=[WEATHER])["usage"]["completion_tokens"] > 0
    body = chat_body(tools=[WEATHER], max_tokens=24)
    assert text_of(stream(client, CHAT, body)) == (text(auto) or "")


def test_case_47_bad_tools(client):
    assert refused(client, CHAT, chat_body(tool_choice="required"))["param"] == "tool_choice"
    bad = {"type": "function", "function": {"name": "x y"}}
    assert refused(client, CHAT, chat_body(tools=[bad]))["param"] == "tools.0.function.name"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_case_48_json_schema(client, path):
    make = chat_body if path == CHAT else completion_body
    body = make(response_format=SCHEMA, max_tokens=64, temperature=1, seed=5)
    answer = text(client.post(path, json=body).json())
    jsonschema.validate(json.loads(answer), PARAMETERS)
    assert text_of(stream(client, path, body)) == answer


def test_case_48_json_object(client):
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=120)
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(text(answer)), dict)
    assert text(answer).lstrip().startswith("{")


@pytest.mark.parametrize(
    ("fields", "is_right"),
    [
        ({"structured_outputs": {"choice": ["red", "green"]}}, lambda t: t in ("red", "green")),
        ({"guided_choice": ["red", "green"]}, lambda t: t in ("red", "green")),
        ({"structured_outputs": {"regex": "[0-9]{3}-x"}}, lambda t: t[3:] == "-x"),
        ({"guided_regex": "[0-9]{3}-x"}, lambda t: t[:3].isdigit()),
        ({"structured_outputs": {"grammar": 'root ::= "ab" | "cd"'}}, lambda t: t in ("ab", "cd")),
        ({"guided_json": {"type": "boolean"}}, lambda t: t.strip() in ("true", "false")),
        ({"structured_outputs": {"json": '{"const": 5}'}}, lambda t: t.strip() == "5"),
    ],
)
def test_case_48_other_forms(client, fields, is_right):
    answer = complete(client, max_tokens=16, temperature=1, **fields)
    assert is_right(text(answer)), answer
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_case_48_51_52_bad_forms(client):
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
    assert refused(client, CHAT, chat_body(response_format=bad))["param"] == "response_format"
    unknown = chat_body(response_format={"type": "xml"})
    assert refused(client, CHAT, unknown)["param"] == "response_format"
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    messages = [{"role": "user", "content": [part]}]
    error = refused(client, CHAT, chat_body(messages=messages))
    assert error["param"] == "messages.0.content.0"


def test_case_61_62_63_prompts_of_all_kinds(client):
    texts = ["The sky is", "One two three", "Hello"]
    singles = [text(complete(client, prompt=p)) for p in texts]
    batch = complete(client, prompt=texts)
    assert [text(batch, i) for i in range(3)] == singles
    ids = [client.post("/tokenize", json={"prompt": p}).json()["tokens"] for p in texts]
    by_ids = complete(client, prompt=ids)
    assert [text(by_ids, i) for i in range(3)] == singles
    assert by_ids["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert complete(client, prompt=ids[0])["usage"]["prompt_tokens"] == len(ids[0])


def test_case_64_65_echo_with_logprobs(client):
    prompt = "The sky is blue"
    ids = client.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    plain = complete(client, prompt=prompt, max_tokens=3)
    echoed = complete(client, prompt=ids, max_tokens=3, echo=True, logprobs=2)
    assert text(echoed) == prompt + text(plain)
    arrays = echoed["choices"][0]["logprobs"]
    num_tokens = len(ids) + 3
    assert {name: len(values) for name, values in arrays.items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), num_tokens
    )
    assert arrays["token_logprobs"][0] is None and arrays["top_logprobs"][0] is None
    assert all(value <= 0 for value in arrays["token_logprobs"][1:])
    for offset, token in zip(arrays["text_offset"], arrays["tokens"], strict=True):
        assert text(echoed)[offset:].startswith(token)
    chunks = stream(
        client, COMPLETIONS, completion_body(prompt=prompt, max_tokens=3, echo=True, logprobs=2)
    )
    joined = [v for c in choices_of(chunks) for v in (c["logprobs"] or {}).get("tokens", [])]
    assert joined == arrays["tokens"] and text_of(chunks) == text(echoed)


def test_case_65_scoring_alone(client):
    prompt = client.post("/tokenize", json={"prompt": "one two three four"}).json()["tokens"]
    answer = complete(client, prompt=[prompt], max_tokens=0, echo=True, logprobs=1)
    arrays = answer["choices"][0]["logprobs"]
    assert len(arrays["tokens"]) == len(prompt)
    assert answer["usage"]["completion_tokens"] == 0
    again = complete(client, prompt=[prompt], max_tokens=1, echo=True, logprobs=1)
    scores = again["choices"][0]["logprobs"]["token_logprobs"]
    assert scores[1:-1] == pytest.approx(arrays["token_logprobs"][1:], abs=1e-4)


def test_case_66_fields_of_old_are_never_a_failure_of_ours(client):
    for fields in ({"suffix": "x"}, {"best_of": 3}, {"prompt": ""}, {"prompt": []}):
        assert refused(client, COMPLETIONS, completion_body(**fields))["param"] in fields
    assert complete(client, best_of=1)


def test_case_67_token_ids_out_of_the_vocabulary(client):
    for prompt in ([-1], [10**7], [1, 2**40]):
        assert refused(client, COMPLETIONS, completion_body(prompt=prompt))["param"] == "prompt"


def test_case_68_exact_lengths_and_top_k(client):
    greedy = text(complete(client))
    assert text(complete(client, temperature=1, top_k=1, seed=9)) == greedy
    fields = {"ignore_eos": True, "min_tokens": 12, "max_tokens": 12}
    assert complete(client, **fields)["usage"]["completion_tokens"] == 12


def test_case_69_stop_token_ids(client):
    whole = complete(client, return_token_ids=True)["choices"][0]
    stop = whole["token_ids"][4]
    at = whole["token_ids"].index(stop)
    cut = complete(client, stop_token_ids=[stop], return_token_ids=True)["choices"][0]
    assert cut["stop_reason"] == stop and cut["finish_reason"] == "stop"
    assert cut["token_ids"] == whole["token_ids"][:at]
    kept = complete(
        client, stop_token_ids=[stop], include_stop_str_in_output=True, return_token_ids=True
    )["choices"][0]
    assert kept["token_ids"] == whole["token_ids"][: at + 1]
    assert whole["text"].startswith(kept["text"]) and len(kept["text"]) > len(cut["text"])
    word = whole["text"][3:6]
    shown = complete(client, stop=word, include_stop_str_in_output=True)["choices"][0]["text"]
    assert shown == whole["text"][: whole["text"].index(word) + 3]


def test_case_70_prompt_logprobs(client):
    answer = complete(client, prompt_logprobs=1, return_token_ids=True)["choices"][0]
    ids, entries = answer["prompt_token_ids"], answer["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(ids)
    for token_id, entry in zip(ids[1:], entries[1:], strict=True):
        assert -math.inf < entry[str(token_id)]["logprob"] <= 0
        assert any(found["rank"] == 1 for found in entry.values())
    assert len(chat(client, prompt_logprobs=0)["prompt_logprobs"]) > 1


def test_case_70_tokens_that_may_and_may_not_be(client):
    first = complete(client, return_token_ids=True, max_tokens=1)["choices"][0]
    (chosen,) = first["token_ids"]
    assert text(complete(client, logit_bias={str(chosen): -100}, max_tokens=1)) != first["text"]
    allowed = complete(client, allowed_token_ids=[50, 51], return_token_ids=True)["choices"][0]
    assert set(allowed["token_ids"]) <= {50, 51}
    without = complete(client, bad_words=[first["text"].strip()], max_tokens=4)
    assert first["text"].strip() not in text(without).split()
    named = complete(client, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)
    assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{chosen}"]


def test_case_70_truncation_and_salts(client):
    prompt = list(range(200, 300))
    kept = complete(client, prompt=prompt, truncate_prompt_tokens=10, return_token_ids=True)
    assert kept["choices"][0]["prompt_token_ids"] == prompt[-10:]
    plain = text(complete(client, prompt=prompt))
    for _ in range(2):
        salted = complete(client, prompt=prompt, cache_salt=f"salt {len(plain)}")
        assert text(salted) == plain
    assert complete(client, prompt=prompt, cache_salt="another")["usage"][
        "prompt_tokens_details"
    ] == {"cached_tokens": 0}


def test_continued_message_begins_where_it_was(client):
    said = [*HELLO, {"role": "assistant", "content": "Hello! My name"}]
    go_on = chat(client, messages=said, continue_final_message=True, return_token_ids=True)
    prompt = client.post("/detokenize", json={"tokens": go_on["prompt_token_ids"]}).json()["prompt"]
    assert prompt.endswith("Hello! My name")


def test_case_71_tokenize_round_trip(client):
    said = "Größe 🙂 of it"
    tokens = client.post("/tokenize", json={"prompt": said}).json()
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == said
    assert complete(client, prompt=said)["usage"]["prompt_tokens"] == tokens["count"]
    of_chat = client.post("/tokenize", json={"messages": HELLO}).json()["count"]
    assert chat(client)["usage"]["prompt_tokens"] == of_chat


def test_nothing_leaked(system: RunningSystem):
    system.assert_nothing_leaked()
