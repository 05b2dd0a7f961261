"""A streaming client that costs little: when each token of one completion arrived."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

TIMEOUT_S = 180.0


async def token_times(
    port: int, ids: list[int], output_len: int, *, on_token: Callable[[int], None] | None = None
) -> list[float]:
    """Monotonic seconds of each chunk with a token, greedy and without an end before the length.

    `on_token` is called with the number of tokens so far. Plain sockets: the client shares the
    cores with what it measures. Raises RuntimeError when the stream does not come or is cut.
    """
    body = json.dumps(
        {
            "prompt": ids,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the system answered {status!r}")
        times: list[float] = []
        async with asyncio.timeout(TIMEOUT_S):
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                if b'"error"' in line:
                    raise RuntimeError(f"the stream ended with {line!r}")
                times.append(time.perf_counter())
                if on_token is not None:
                    on_token(len(times))
    finally:
        writer.close()
    if len(times) < 2:
        raise RuntimeError(f"the stream had {len(times)} tokens")
    return times
