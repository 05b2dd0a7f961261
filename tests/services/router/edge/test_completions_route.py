"""POST /v1/completions and the small GET routes over a real socket."""

from __future__ import annotations

import json

import pytest

URL = "/v1/completions"


def texts(body: dict) -> list[str]:
    assert [c["index"] for c in body["choices"]] == list(range(len(body["choices"])))
    return [c["text"] for c in body["choices"]]


@pytest.fixture
def echo(generator, tokenizer):
    """Answers with the text of the prompt."""
    generator.reply = lambda request: tokenizer.decode(request.prompt_token_ids)
    return generator


async def test_answer_has_the_openai_shape(client):
    body = (await client.post(URL, json={"model": "tiny", "prompt": "abc"})).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert texts(body) == ["Hello, world"]
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_raw_text_is_encoded_with_special_tokens(client, generator, tokenizer):
    await client.post(URL, json={"prompt": "abc"})
    (request,) = generator.started
    assert request.prompt_token_ids == tuple(tokenizer.encode("abc", add_special_tokens=True))
    assert request.prompt_token_ids[0] == 256


async def test_default_length_is_sixteen(client, generator):
    generator.reply = lambda request: "x" * 50
    body = (await client.post(URL, json={"prompt": "abc"})).json()
    assert texts(body) == ["x" * 16]
    assert body["choices"][0]["finish_reason"] == "length"


async def test_token_ids_are_taken_as_they_are(client, generator):
    body = (await client.post(URL, json={"prompt": [1, 2, 3]})).json()
    assert generator.started[0].prompt_token_ids == (1, 2, 3)
    assert body["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("prompt", [["one", "two", "three"], [[70, 71], [72], [73, 74, 75]]])
async def test_batches_keep_their_order_and_sum_their_usage(client, echo, tokenizer, prompt):
    body = (await client.post(URL, json={"prompt": prompt})).json()
    wanted = [p if isinstance(p, str) else tokenizer.decode(p) for p in prompt]
    assert texts(body) == wanted
    assert body["usage"]["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in echo.started)
    singles = [texts((await client.post(URL, json={"prompt": p})).json())[0] for p in prompt]
    assert singles == wanted


async def test_batch_times_n_orders_choices_by_prompt(client, echo):
    body = (await client.post(URL, json={"prompt": ["a", "b"], "n": 2})).json()
    assert texts(body) == ["a", "a", "b", "b"]


async def test_stream_equals_answer(client, generator):
    generator.reply = lambda request: "漢字 text"
    response = await client.post(URL, json={"prompt": ["a", "b"], "stream": True})
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in response.text.split("\n\n")
        if line and line != "data: [DONE]"
    ]
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own) == "漢字 text"
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
    assert response.text.endswith("data: [DONE]\n\n")


async def test_logprobs_are_parallel_arrays(client):
    body = (await client.post(URL, json={"prompt": "a", "logprobs": 2})).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list("Hello, world")
    assert logprobs["text_offset"] == list(range(12))
    assert logprobs["token_logprobs"] == [-0.5] * 12
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


async def test_streamed_logprobs_join_to_the_answer(client):
    fields = {"prompt": "a", "logprobs": 1}
    whole = (await client.post(URL, json=fields)).json()["choices"][0]["logprobs"]
    response = await client.post(URL, json={**fields, "stream": True})
    joined: dict[str, list] = {name: [] for name in whole}
    for line in response.text.split("\n\n"):
        if line.startswith("data: {"):
            logprobs = json.loads(line[6:])["choices"][0]["logprobs"]
            for name, values in (logprobs or {}).items():
                joined[name] += values
    assert joined == whole


async def test_models_list_and_single(client):
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert card["id"] == "tiny"
    assert card["object"] == "model"
    assert card["max_model_len"] == 256
    assert card["created"] == 1_700_000_000
    assert (await client.get("/v1/models/tiny")).json() == card
    missing = await client.get("/v1/models/org/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_model_names_may_hold_slashes(client, generator):
    generator.names = ("org/name",)
    assert (await client.get("/v1/models/org/name")).json()["id"] == "org/name"
    assert (await client.get("/v1/models/org%2Fname")).json()["id"] == "org/name"


async def test_health_follows_the_dispatcher(client, generator):
    assert (await client.get("/health")).json()["status"] == "ok"
    generator.is_ready = False
    response = await client.get("/health")
    assert response.status_code == 503
    assert response.json()["reason"] == "scripted"


@pytest.mark.parametrize(
    "path", ["/health", "/version", "/metrics", "/v1/models", "/v1/models/tiny"]
)
async def test_head_equals_get_without_a_body(client, path):
    get, head = await client.get(path), await client.head(path)
    assert get.status_code == head.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]


async def test_version_and_metrics(client):
    assert (await client.get("/version")).json()["version"]
    metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE baton_requests_total counter" in metrics.text


async def test_connection_is_kept(client, edge):
    for _ in range(5):
        await client.post(URL, json={"prompt": "a"})
        await client.post(URL, json={"prompt": "a", "stream": True})
        await client.get("/nope")
    assert len(edge.server._server.server_state.connections) == 1
