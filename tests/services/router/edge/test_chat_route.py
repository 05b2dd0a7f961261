"""POST /v1/chat/completions over a real socket."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from baton.core.request import FinishReason
from services.router.requests.generation import GenerationDelta

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return {"model": "tiny", "messages": HELLO, **fields}


def events(text: str) -> list[dict]:
    """The JSON of every event; checks the framing on the way."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert parts.pop() == "data: [DONE]"
    assert all(p.startswith("data: ") and "\n" not in p for p in parts)
    return [json.loads(p.removeprefix("data: ")) for p in parts]


async def stream(client, **fields) -> list[dict]:
    response = await client.post(URL, json=chat(stream=True, **fields))
    assert response.status_code == 200
    return events(response.text)


def content_of(chunks: list[dict], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


async def test_answer_has_the_openai_shape(client, edge):
    answer = (await client.post(URL, json=chat())).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Hello, world",
        "refusal": None,
    }
    assert choice["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(edge.generator.started[0].prompt_token_ids)
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


async def test_template_is_applied_without_adding_special_tokens(client, generator, tokenizer):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "name": "bob", "content": "é"},
    ]
    await client.post(URL, json=chat(messages=messages))
    prompt = generator.started[0].prompt_token_ids
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    assert text == "<|bos|>[system]be brief[user]ab[assistant][user]é[assistant]"
    assert prompt.count(prompt[0]) == 1


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_max_tokens_is_exact_and_finishes_with_length(client, name):
    answer = (await client.post(URL, json=chat(**{name: 3}))).json()
    assert answer["choices"][0]["message"]["content"] == "Hel"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_absent_max_tokens_leaves_the_rest_of_the_context(client, generator):
    await client.post(URL, json=chat())
    request = generator.started[0]
    assert request.sampling.max_tokens == 256 - len(request.prompt_token_ids)


async def test_ids_are_unique(client):
    answers = await asyncio.gather(*(client.post(URL, json=chat()) for _ in range(8)))
    assert len({a.json()["id"] for a in answers}) == 8


async def test_stream_has_role_first_one_finish_and_constant_head(client):
    chunks = await stream(client)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    deltas = [c["choices"][0] for c in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in d["delta"] for d in deltas[1:])
    assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == ["stop"]
    assert deltas[-1]["delta"] == {}
    assert content_of(chunks) == "Hello, world"
    assert all("usage" not in c for c in chunks)


async def test_stream_usage_comes_last_with_empty_choices_when_asked(client):
    chunks = await stream(client, stream_options={"include_usage": True})
    *others, last = chunks
    assert last["choices"] == []
    assert all(c["usage"] is None and c["choices"] for c in others)
    whole = (await client.post(URL, json=chat())).json()
    assert last["usage"] == whole["usage"]


async def test_stream_equals_answer_and_never_splits_a_character(client, generator):
    generator.reply = lambda request: "naïve 😀 漢字 e\u0301"
    chunks = await stream(client)
    whole = (await client.post(URL, json=chat())).json()
    assert content_of(chunks) == whole["choices"][0]["message"]["content"]
    assert "\ufffd" not in content_of(chunks)


@pytest.mark.parametrize("stop", ["wor", ["zzz", "wor"]])
async def test_stop_strings_reach_the_dispatcher_and_name_the_reason(client, generator, stop):
    answer = (await client.post(URL, json=chat(stop=stop))).json()
    assert answer["choices"][0]["message"]["content"] == "Hello, "
    assert answer["choices"][0]["stop_reason"] == "wor"
    assert generator.started[0].stop == ((stop,) if isinstance(stop, str) else tuple(stop))
    chunks = await stream(client, stop=stop)
    assert content_of(chunks) == "Hello, "


async def test_n_choices_have_indices_own_seeds_and_summed_usage(client, generator):
    answer = (await client.post(URL, json=chat(n=3, seed=7, temperature=0.5))).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == len(generator.started[0].prompt_token_ids)
    seeds = [r.sampling.seed for r in generator.started]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert all(-(2**63) <= s < 2**63 for s in seeds)
    assert len({r.request_id for r in generator.started}) == 3


async def test_streamed_choices_each_open_and_finish_once(client):
    chunks = await stream(client, n=2)
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert sum(d["finish_reason"] is not None for d in own) == 1
        assert content_of(chunks, index) == "Hello, world"


async def test_logprobs_have_one_entry_per_token_with_bytes(client):
    fields = {"logprobs": True, "top_logprobs": 2}
    answer = (await client.post(URL, json=chat(**fields))).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in entries) == b"Hello, world"
    assert all(len(e["top_logprobs"]) == 2 for e in entries)
    chunks = await stream(client, **fields)
    streamed = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == entries


async def test_logprobs_without_alternatives_have_empty_lists(client, generator):
    answer = (await client.post(URL, json=chat(logprobs=True, top_logprobs=0))).json()
    assert {len(e["top_logprobs"]) for e in answer["choices"][0]["logprobs"]["content"]} == {0}
    assert generator.started[0].sampling.logprobs == 0


async def test_logprobs_of_incomplete_characters_are_streamed_too(client, generator):
    generator.reply = lambda request: "é😀"
    chunks = await stream(client, logprobs=True)
    entries = [
        e
        for c in chunks
        if c["choices"][0]["logprobs"]
        for e in c["choices"][0]["logprobs"]["content"]
    ]
    assert bytes(b for e in entries for b in e["bytes"]).decode() == "é😀"
    assert content_of(chunks) == "é😀"


async def test_impossible_tokens_have_a_finite_logprob(client, generator):
    original = generator._logprobs

    def minus_infinity(request, token_id):
        return tuple(
            dataclasses.replace(entry, logprob=float("-inf"))
            for entry in original(request, token_id)
        )

    generator._logprobs = minus_infinity
    answer = (await client.post(URL, json=chat(logprobs=True))).json()
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0


async def test_sampling_fields_reach_the_dispatcher(client, generator):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 1_000_000,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 2.0,
        "logit_bias": {"5": -100, "7": 1.5},
        "seed": -3,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 9,
    }
    await client.post(URL, json=chat(**fields))
    sampling = generator.started[0].sampling
    assert sampling.logit_bias == ((5, -100.0), (7, 1.5))
    assert sampling.top_k == 258
    assert sampling.stop_token_ids == (9,)
    for name in ("temperature", "top_p", "min_p", "seed", "ignore_eos", "min_tokens", "max_tokens"):
        assert getattr(sampling, name) == fields[name]


async def test_top_k_minus_one_means_the_whole_vocabulary(client, generator):
    await client.post(URL, json=chat(top_k=-1))
    assert generator.started[0].sampling.top_k == 0


async def test_nulls_and_fields_without_effect_are_tolerated(client, generator):
    fields = dict.fromkeys(
        ("temperature", "stop", "n", "seed", "tools", "stream_options", "logit_bias", "top_k",
         "response_format", "max_tokens", "logprobs", "user", "stream", "suffix")
    )  # fmt: skip
    fields |= {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tool_choice": "none",
        "reasoning_effort": "low",
        "modalities": ["text"],
        "x_unknown": {"deep": [1]},
    }
    assert (await client.post(URL, json=chat(**fields))).status_code == 200
    assert generator.started[0].sampling.temperature == 1.0


async def test_model_may_be_left_out_while_there_is_one(client, generator):
    assert (await client.post(URL, json={"messages": HELLO})).status_code == 200
    generator.names = ("tiny", "other")
    response = await client.post(URL, json={"messages": HELLO})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


async def test_empty_output_is_a_whole_answer(client, generator):
    generator.reply = lambda request: ""
    answer = (await client.post(URL, json=chat())).json()
    assert answer["choices"][0]["message"]["content"] == ""
    chunks = await stream(client)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, "stop"]


async def test_parallel_streams_keep_their_own_text_and_length(client, generator):
    generator.reply = lambda request: "x" * 200
    generator.step_s = 0.001

    async def one(length: int) -> None:
        chunks = await stream(client, max_tokens=length)
        assert content_of(chunks) == "x" * length

    await asyncio.gather(*(one(length) for length in range(5, 29)))
    await generator.until_idle(24)
    assert not generator.closed_early


async def test_request_id_is_echoed_or_made(client):
    given = await client.post(URL, json=chat(), headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    streamed = await client.post(URL, json=chat(stream=True), headers={"x-request-id": "abc-2"})
    assert streamed.headers["x-request-id"] == "abc-2"
    unusable = await client.post(URL, json=chat(), headers={"x-request-id": "x" * 500})
    assert len(unusable.headers["x-request-id"]) < 64


async def test_abnormal_end_is_an_error(client, generator):
    async def broken(request):
        generator.finished.append(request.request_id)
        yield [GenerationDelta("a", finish_reason=FinishReason.ERROR)]

    generator.generate = broken
    response = await client.post(URL, json=chat())
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "internal_error"
