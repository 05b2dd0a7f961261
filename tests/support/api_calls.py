"""Calls of the HTTP API and what came of them, for tests over real clients."""

from __future__ import annotations

import json
from typing import Any

import httpx

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Say hello."}]


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "temperature": 0, "max_tokens": 8, **fields}


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "The sky is", "temperature": 0, "max_tokens": 8, **fields}


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    return answered(client, CHAT, chat_body(**fields))


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    return answered(client, COMPLETIONS, completion_body(**fields))


def answered(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert isinstance(answer, dict)
    return answer


def refused(client: httpx.Client, path: str, body: object, status: int = 400) -> dict[str, Any]:
    """The error object of an answer that is one."""
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All chunks of a streamed answer; it ended as it should."""
    chunks = []
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    for line in lines[:-1]:
        assert line.startswith("data: "), line
        chunk = json.loads(line.removeprefix("data: "))
        assert "error" not in chunk, chunk
        chunks.append(chunk)
    return chunks


def choices_of(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Of a streamed completion or chat."""
    return "".join(
        (c["delta"].get("content") or "") if "delta" in c else c["text"]
        for c in choices_of(chunks, index)
    )


def calls_of(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, str]]:
    """Names and arguments of the tool calls of a streamed chat."""
    calls: list[dict[str, str]] = []
    for choice in choices_of(chunks, index):
        for delta in choice["delta"].get("tool_calls", []):
            function = delta["function"]
            if "name" in function:
                assert delta["index"] == len(calls) and delta["id"] and delta["type"] == "function"
                calls.append({"name": function["name"], "arguments": ""})
            calls[delta["index"]]["arguments"] += function["arguments"]
    return calls
