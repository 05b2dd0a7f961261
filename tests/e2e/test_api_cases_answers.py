"""What clients expect of answers and streams, by case number of the list of cases."""

from __future__ import annotations

import time

import pytest

from api_calls import (
    CHAT,
    COMPLETIONS,
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

BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


def body_for(path: str, **fields):
    return chat_body(**fields) if path == CHAT else completion_body(**fields)


def text(answer: dict, index: int = 0) -> str:
    choice = answer["choices"][index]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_case_25_two_choices(client):
    one = chat(client, temperature=1, seed=3)
    two = chat(client, temperature=1, seed=3, n=2)
    assert [c["index"] for c in two["choices"]] == [0, 1]
    assert text(two) == text(one)
    assert two["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert two["usage"]["completion_tokens"] > one["usage"]["completion_tokens"]


def test_case_26_27_stop_cuts_exactly_and_is_held_back(client):
    whole = text(complete(client, max_tokens=24))
    stop = whole[9:13]
    wanted = whole[: whole.index(stop)]
    cut = complete(client, max_tokens=24, stop=[stop, "never there"])
    assert text(cut) == wanted
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["stop_reason"] == stop
    assert text_of(stream(client, COMPLETIONS, completion_body(max_tokens=24, stop=stop))) == wanted


def test_case_28_29_chat_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=3)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert data.decode() == text(answer)
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == max(
            t["logprob"] for t in entry["top_logprobs"]
        )
        # Greedy: the chosen one is the most likely one, the first token's included.
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
    none = chat(client, logprobs=True, top_logprobs=0)["choices"][0]["logprobs"]["content"]
    assert [e["top_logprobs"] for e in none] == [[]] * len(none)
    assert chat(client)["choices"][0]["logprobs"] is None


@BOTH
def test_case_30_logprobs_of_the_chunks_are_those_of_the_answer(client, path):
    body = body_for(path, logprobs=True if path == CHAT else 1)
    answer = client.post(path, json=body).json()["choices"][0]["logprobs"]
    parts = [c["logprobs"] for c in choices_of(stream(client, path, body)) if c["logprobs"]]
    joined = {
        key: [entry for part in parts for entry in part[key]]
        for key, value in answer.items()
        if value is not None
    }
    assert joined == {key: value for key, value in answer.items() if value is not None}


def test_case_31_sampling_fields_are_accepted(client):
    for fields in (
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "seed": 1},
        {"presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.2},
        {"logit_bias": {"5": 2}},
    ):
        assert complete(client, **fields)["usage"]["completion_tokens"] > 0


def test_case_32_cached_tokens_are_in_range(client):
    prompt = list(range(100, 190))
    complete(client, prompt=prompt)
    usage = complete(client, prompt=prompt)["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


@BOTH
def test_case_33_34_form_of_a_stream(client, path):
    with client.stream("POST", path, json={**body_for(path), "stream": True}) as response:
        assert "content-length" not in response.headers
        assert response.headers["content-type"].startswith("text/event-stream")
        data = b"".join(response.iter_raw()).decode()
    events = data.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    chunks = stream(client, path, body_for(path))
    for name in ("id", "created", "model", "object"):
        assert len({chunk[name] for chunk in chunks}) == 1
    if path == CHAT:
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    finishes = [c["finish_reason"] for c in choices_of(chunks) if c["finish_reason"]]
    assert len(finishes) == 1 and choices_of(chunks)[-1]["finish_reason"]


@BOTH
def test_case_35_36_37_usage_in_streams(client, path):
    body = body_for(path)
    assert not any(chunk.get("usage") for chunk in stream(client, path, body))
    chunks = stream(client, path, {**body, "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    wanted = client.post(path, json=body).json()["usage"]
    wanted.pop("prompt_tokens_details"), chunks[-1]["usage"].pop("prompt_tokens_details")
    assert chunks[-1]["usage"] == wanted


@BOTH
def test_case_38_60_stream_is_the_answer(client, path):
    body = body_for(path, max_tokens=24)
    assert text_of(stream(client, path, body)) == text(client.post(path, json=body).json())


def test_case_39_characters_are_never_split(client):
    ids = client.post("/tokenize", json={"prompt": "漢字🙂é"}).json()["tokens"]
    # Each is about as likely as the others, and most are parts of characters.
    body = completion_body(allowed_token_ids=ids, temperature=2, seed=4, max_tokens=40)
    chunks = stream(client, COMPLETIONS, body)
    whole = text(client.post(COMPLETIONS, json=body).json())
    assert text_of(chunks) == whole
    for choice in choices_of(chunks):
        assert choice["text"].count("\ufffd") <= whole.count("\ufffd")


def test_case_40_chunks_arrive_while_it_generates(client):
    body = completion_body(max_tokens=40, ignore_eos=True, stream=True)
    times = []
    with client.stream("POST", COMPLETIONS, json=body) as response:
        for line in response.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) >= 40
    assert len(set(times)) > 5 and times[-1] > times[0]


def test_case_41_streamed_choices(client):
    body = chat_body(n=2, temperature=1, seed=3)
    chunks = stream(client, CHAT, body)
    answer = chat(client, n=2, temperature=1, seed=3)
    assert [text_of(chunks, i) for i in (0, 1)] == [text(answer, i) for i in (0, 1)]
    for index in (0, 1):
        assert sum(c["finish_reason"] is not None for c in choices_of(chunks, index)) == 1


def test_case_42_continuous_usage_grows(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, CHAT, chat_body(stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 0
    prompts = {chunk["usage"]["prompt_tokens"] for chunk in chunks}
    assert len(prompts) == 1 and prompts.pop() > 0


@BOTH
def test_case_43_49_50_bad_requests_fail_before_the_stream(client, path):
    for fields, param in (
        ({"temperature": -1}, "temperature"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ):
        error = refused(client, path, {**body_for(path), "stream": True, **fields})
        assert error["param"] == param
    error = refused(client, path, {**body_for(path), "stream_options": {"include_usage": True}})
    assert error["param"] == "stream_options"


def test_nothing_leaked(system: RunningSystem):
    system.assert_nothing_leaked()
