"""One fixed greedy completion, whole or streamed with something happening in the middle."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import httpx

from running_system import RunningSystem

PROMPT = list(range(1000, 1200))
MAX_TOKENS = 200
TIMEOUT_S = 90.0


def body(**changes: object) -> dict[str, object]:
    return {
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        **changes,
    }


def complete(system: RunningSystem) -> str:
    response = httpx.post(
        f"{system.url}/v1/completions", json=body(), timeout=TIMEOUT_S, trust_env=False
    )
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["text"]
    assert isinstance(text, str)
    return text


def stream_with(system: RunningSystem, at_chunk: int, action: Callable[[], None]) -> str:
    """Stream the completion, run `action` once `at_chunk` chunks have come, return the text."""
    text = ""
    num_chunks = 0
    with httpx.stream(
        "POST",
        f"{system.url}/v1/completions",
        json=body(stream=True),
        timeout=TIMEOUT_S,
        trust_env=False,
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            message = json.loads(line[6:])
            assert "error" not in message, message
            text += "".join(choice["text"] for choice in message["choices"])
            num_chunks += 1
            if num_chunks == at_chunk:
                threading.Thread(target=action).start()
    return text
