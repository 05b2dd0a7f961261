"""Responses and Messages give what chat completions give, on the real model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from api_calls import CHAT, answered

pytestmark = pytest.mark.model

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SYSTEM, QUESTION = "You are brief.", "Name three colours, please."
TURNS = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
SCHEMA = {"type": "object", "properties": {"c": {"enum": ["red", "blue"]}}, "required": ["c"]}
FORMAT = {"name": "colour", "schema": SCHEMA}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.2, "seed": 7, "top_k": 50, "top_p": 0.9},
    "stop": {"temperature": 0, "stop": [" the", "e"]},
}


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def of_response(client: httpx.Client, body: dict[str, Any]) -> list[str]:
    """Whole and streamed."""
    body = {"instructions": SYSTEM, "input": QUESTION, **body}
    (item,) = answered(client, RESPONSES, body)["output"]
    found = events(client, RESPONSES, body)
    deltas = [e["delta"] for e in found if e["type"] == "response.output_text.delta"]
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == "".join(deltas)
    return [item["content"][0]["text"], "".join(deltas)]


def of_message(client: httpx.Client, body: dict[str, Any]) -> list[str]:
    """Whole and streamed."""
    body = {"system": SYSTEM, "messages": TURNS[1:], **body}
    (block,) = answered(client, MESSAGES, body)["content"]
    deltas = [e["delta"] for e in events(client, MESSAGES, body) if "index" in e and "delta" in e]
    return [block["text"], "".join(delta["text"] for delta in deltas)]


@pytest.mark.parametrize("name", CASES)
def test_text_is_that_of_chat(client, name):
    fields = CASES[name]
    chat = answered(client, CHAT, {"messages": TURNS, "max_tokens": 20, **fields})
    text = chat["choices"][0]["message"]["content"]
    assert text
    assert of_response(client, {"max_output_tokens": 20, **fields}) == [text, text]
    assert of_message(client, {"max_tokens": 20, **fields}) == [text, text]


def test_forms_of_output_are_those_of_chat(client):
    wanted = {"type": "json_schema", "json_schema": FORMAT}
    common = {"temperature": 1, "seed": 2, "top_k": 20}
    body = {"messages": TURNS, "max_tokens": 12, "response_format": wanted, **common}
    text = answered(client, CHAT, body)["choices"][0]["message"]["content"]
    assert text.startswith("{")
    named = {"format": {"type": "json_schema", **FORMAT}}
    assert of_response(client, {"max_output_tokens": 12, "text": named, **common}) == [text, text]
    bare = {"format": {"type": "json_schema", "schema": SCHEMA}}
    assert of_message(client, {"max_tokens": 12, "output_config": bare, **common}) == [text, text]


def test_a_conversation_goes_on_from_its_stored_answer(client):
    first = answered(
        client, RESPONSES, {"input": QUESTION, "temperature": 0, "max_output_tokens": 8}
    )
    text = first["output"][0]["content"][0]["text"]
    body = {"input": "More.", "temperature": 0, "max_output_tokens": 8}
    second = answered(client, RESPONSES, {**body, "previous_response_id": first["id"]})
    turns = [TURNS[1], {"role": "assistant", "content": text}, {"role": "user", "content": "More."}]
    chat = answered(client, CHAT, {"messages": turns, "temperature": 0, "max_tokens": 8})
    assert second["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert client.get(f"{RESPONSES}/{second['id']}").json() == second


def test_a_background_response_can_be_cancelled(client):
    body = {"input": QUESTION, "background": True, "ignore_eos": True}
    response = answered(client, RESPONSES, body)
    ended = client.post(f"{RESPONSES}/{response['id']}/cancel").json()
    assert ended["status"] in ("cancelled", "completed", "incomplete")
    assert client.get(f"{RESPONSES}/{response['id']}").json() == ended
