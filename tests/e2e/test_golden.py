"""Disaggregated over HTTP equals the reference, token for token and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvtransfer.select import nixl_obstacle
from running_system import RunningSystem

GOLDEN = Path(__file__).parents[1] / "parity/golden/smollm2_135m_instruct_greedy.json"
ITEMS: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["items"]

pytestmark = pytest.mark.model


def model_name(client: httpx.Client) -> str:
    name = client.get("/v1/models").json()["data"][0]["id"]
    assert isinstance(name, str)
    return name


def metric(client: httpx.Client, name: str) -> float:
    (line,) = (x for x in client.get("/metrics").text.splitlines() if x.startswith(name))
    return float(line.split()[-1])


@pytest.mark.parametrize("item", ITEMS, ids=lambda i: i["name"])
def test_completion_of_token_ids_equals_the_reference(
    client: httpx.Client, item: dict[str, Any]
) -> None:
    response = client.post(
        "/v1/completions",
        json={
            "model": model_name(client),
            "prompt": item["prompt_token_ids"],
            "max_tokens": 64,
            "temperature": 0,
            "logprobs": 0,
        },
    )
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["text"] == item["output_text"]
    assert choice["finish_reason"] == item["finish_reason"]
    chosen = choice["logprobs"]["token_logprobs"]
    assert chosen == pytest.approx(item["chosen_logprobs"][: len(chosen)], abs=1e-3)
    assert response.json()["usage"]["prompt_tokens"] == len(item["prompt_token_ids"])


def test_the_reference_was_computed_through_both_workers(
    client: httpx.Client, system: RunningSystem
) -> None:
    assert "nixl" in {w.info.transport for w in system.workers()} or nixl_obstacle()
    moved = metric(client, "baton_kv_transfer_bytes_sum")
    assert moved >= 64 * system.worker("decode").layout.block_size
    assert metric(client, 'baton_placements_total{kind="remote_prefill"}') >= len(ITEMS) - 1


def test_chat_of_messages_equals_the_reference(client: httpx.Client) -> None:
    for item in (i for i in ITEMS if i["kind"] == "chat"):
        response = client.post(
            "/v1/chat/completions",
            json={
                "model": model_name(client),
                "messages": item["messages"],
                "max_tokens": 64,
                "temperature": 0,
            },
        )
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == item["output_text"]
