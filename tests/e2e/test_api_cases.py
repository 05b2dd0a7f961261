"""What clients expect of the service around the answers, by case number of the list of cases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api_calls import CHAT, COMPLETIONS, HELLO, chat, chat_body, complete, completion_body, refused
from running_system import RunningSystem

pytestmark = pytest.mark.model


def metric(client: httpx.Client, name: str) -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    )


def names_of(client: httpx.Client) -> set[str]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {family.name for family in families}


def test_case_1_3_model_cards(client):
    body = client.get("/v1/models").json()
    assert body["object"] == "list"
    (card,) = body["data"]
    assert card["object"] == "model" and card["owned_by"] and card["created"] > 0
    assert card["max_model_len"] > 0


def test_case_2_model_by_id(client):
    (card,) = client.get("/v1/models").json()["data"]
    assert client.get(f"/v1/models/{card['id']}").json() == card
    missing = client.get("/v1/models/none")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/version", "/ping", "/load", "/openapi.json"])
def test_case_4_5_6_open_routes_answer_json(client, path):
    response = client.get(path)
    assert response.status_code == 200 and isinstance(response.json(), dict)


def test_case_7_8_metrics_parse_and_can_be_asked_for_with_head(client):
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert list(text_string_to_metric_families(response.text))
    head = client.head("/metrics")
    assert head.status_code == 200 and not head.content


def test_case_9_10_names_that_dashboards_and_pickers_look_for(client):
    complete(client)
    names = names_of(client)
    assert {
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
    } <= names


def test_case_11_token_counter_moves_by_the_usage(client):
    before = metric(client, "vllm:generation_tokens_total")
    usage = complete(client)["usage"]
    deadline = time.monotonic() + 5
    while (moved := metric(client, "vllm:generation_tokens_total") - before) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert moved == usage["completion_tokens"]


def test_case_12_unknown_routes_and_wrong_methods(client):
    assert client.get("/nothing").status_code == 404
    wrong = client.get(CHAT)
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    for response in (client.get("/nothing"), wrong):
        assert response.json()["error"]["message"]


def test_case_14_request_id_is_echoed(client):
    response = client.post(CHAT, json=chat_body(max_tokens=1), headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert client.get("/health").headers["x-request-id"]


def test_case_15_connection_is_kept(system):
    with httpx.Client(base_url=system.url, timeout=60, trust_env=False) as client:
        streams = {
            id(client.get("/version").extensions["network_stream"].get_extra_info("socket"))
            for _ in range(3)
        }
    assert len(streams) == 1


def test_case_16_chat_shape_and_fresh_ids(client):
    first, second = chat(client), chat(client)
    assert first["object"] == "chat.completion" and first["id"] != second["id"]
    message = first["choices"][0]["message"]
    assert message["role"] == "assistant" and isinstance(message["content"], str)
    usage = first["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_case_17_18_length_is_exact(client, name):
    body = {"messages": HELLO, "temperature": 0, name: 3, "ignore_eos": True}
    answer = client.post(CHAT, json=body).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_case_19_no_length_is_accepted(client):
    body = {"messages": HELLO, "temperature": 0, "stop": [" ", "!", ".", ","]}
    assert client.post(CHAT, json=body).status_code == 200


def test_case_20_roles_and_names(client):
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Again"},
    ]
    system = chat(client, messages=said)
    developer = chat(client, messages=[{**said[0], "role": "developer"}, *said[1:]])
    assert developer["choices"][0]["message"] == system["choices"][0]["message"]


def test_case_21_content_parts_are_the_string(client):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    whole, split = chat(client), chat(client, messages=[{"role": "user", "content": parts}])
    assert split["choices"][0]["message"] == whole["choices"][0]["message"]
    assert split["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_case_22_nulls_and_fields_of_others_are_tolerated(client):
    body = chat_body(
        stop=None, tools=None, n=None, logit_bias=None, response_format=None, store=False,
        metadata={"a": "b"}, service_tier="auto", prediction=None, verbosity="low", made_up=[1],
        safety_identifier="x", prompt_cache_key="y", parallel_tool_calls=None,
    )  # fmt: skip
    assert client.post(CHAT, json=body).status_code == 200


def test_case_23_greedy_is_repeatable(client):
    assert complete(client)["choices"] == complete(client)["choices"]


def test_case_24_seed_is_repeatable(client):
    texts = {
        seed: {complete(client, temperature=1.5, seed=seed)["choices"][0]["text"] for _ in "12"}
        for seed in (1, 2)
    }
    assert all(len(found) == 1 for found in texts.values())
    assert texts[1] != texts[2]


def test_case_44_45_clients_that_leave_free_their_slots(client, system):
    body = completion_body(max_tokens=400, ignore_eos=True)
    with client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
        next(response.iter_lines())
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=system.url, timeout=0.3, trust_env=False) as hasty,
    ):
        hasty.post(COMPLETIONS, json=body)
    deadline = time.monotonic() + 5
    while metric(client, "vllm:num_requests_running") + client.get("/load").json()["server_load"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert complete(client)["usage"]["completion_tokens"] > 0


async def test_case_46_parallel_requests_keep_their_own_lengths(system):
    async with httpx.AsyncClient(base_url=system.url, timeout=120, trust_env=False) as client:

        async def one(length: int) -> tuple[str, int]:
            body = completion_body(max_tokens=length, ignore_eos=True)
            answer = (await client.post(COMPLETIONS, json=body)).json()
            return answer["id"], answer["usage"]["completion_tokens"]

        found = await asyncio.gather(*map(one, range(1, 25)))
    assert [length for _, length in found] == list(range(1, 25))
    assert len({name for name, _ in found}) == 24


def test_case_53_unknown_model(client):
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, completion_body())):
        error = refused(client, path, {**body, "model": "no/such"}, 404)
        assert error["param"] == "model"


@pytest.mark.parametrize(
    "data", [b'{"a": ', b"[1]", b'"text"', b"5", b"null", b"", b'{"prompt": "\xff"}', b"[" * 20_000]
)
def test_case_54_55_56_bodies_that_are_no_object(client, data):
    for content_type in ("application/json", "text/plain"):
        response = client.post(CHAT, content=data, headers={"content-type": content_type})
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_case_57_58_context_overflow_names_it(client):
    (card,) = client.get("/v1/models").json()["data"]
    longest = card["max_model_len"]
    over = refused(client, COMPLETIONS, completion_body(prompt=[5] * (longest + 1)))
    more = refused(client, COMPLETIONS, completion_body(max_tokens=longest))
    for error in (over, more):
        assert error["code"] == "context_length_exceeded" and str(longest) in error["message"]


def test_case_59_huge_body_and_the_service_lives(client):
    body = json.dumps({"prompt": "x" * (32 << 20)}).encode()
    # It may be cut off while it still sends.
    with contextlib.suppress(httpx.WriteError):
        assert client.post(COMPLETIONS, content=body).status_code == 413
    assert client.get("/health").status_code == 200


def test_nothing_leaked(system: RunningSystem):
    system.assert_nothing_leaked()
