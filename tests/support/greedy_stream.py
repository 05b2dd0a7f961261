"""One greedy stream to its end, whatever happens to the workers meanwhile."""

from __future__ import annotations

import json

import httpx

STREAM_TIMEOUT_S = 120.0


async def stream_text(url: str, prompt: list[int], num_tokens: int) -> str:
    """The text of `num_tokens`. Raises AssertionError when they do not come whole."""
    body = {
        "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    parts: list[str] = []
    is_done = False
    async with (
        httpx.AsyncClient(timeout=STREAM_TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            assert '"error"' not in line, line
            is_done = is_done or line == "data: [DONE]"
            if line.startswith("data: {"):
                parts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    assert is_done, "the stream was cut"
    return "".join(parts)
