"""What reading a token costs the load generator, beside two well-kept HTTP clients.

    python -m bench.loadtest_overhead [--streams 64] [--step-ms 5] [--tokens 200] [--rounds 3]

All read the same server (`bench/router/fake_http.py`, a process of its own), every stream a token
a step, and note the time of each. CPU seconds are those of the client's process; streams one after
the other in as many connections, rounds interleaved, medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import aiohttp
import httpx
import uvloop

from baton.loadtest.generator_watch import RunClock
from baton.loadtest.openai_target import HttpOptions, OpenAiTarget
from baton.loadtest.options import LoadOptions
from baton.loadtest.prompt_text import TokenCost
from baton.loadtest.runner import LoadRunner, Wording
from baton.loadtest.workload import MadeUp
from baton.simulator.arrivals import RequestLengths
from bench import machine

PROMPT_TOKENS = 32


class Round(NamedTuple):
    num_tokens: int
    wall_s: float
    cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s

    @property
    def cpu_us_per_token(self) -> float:
        return 1e6 * self.cpu_s / self.num_tokens


Client = Callable[[str, int, int], Awaitable[int]]
"""URL, streams at a time, tokens of each -> tokens seen, over twice as many streams."""


async def own(url: str, streams: int, tokens: int) -> int:
    clock = RunClock()
    target = OpenAiTarget(HttpOptions(url, "fake"), clock)
    options = LoadOptions(num_requests=2 * streams, concurrency=streams)
    runner = LoadRunner(target, Wording(TokenCost(), "overhead"), options, clock)
    made = MadeUp((RequestLengths(PROMPT_TOKENS, tokens),))
    await runner.run(made.conversations(0), is_open=False)
    await target.aclose()
    return sum(o.num_tokens for o in runner.outcomes)


async def with_httpx(url: str, streams: int, tokens: int) -> int:
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60, trust_env=False) as http:

        async def lane() -> int:
            seen = 0
            for _ in range(2):
                async with http.stream(
                    "POST", "/v1/chat/completions", json=_body(tokens)
                ) as response:
                    async for line in response.aiter_lines():
                        seen += _is_token(line)
            return seen

        return sum(await asyncio.gather(*(lane() for _ in range(streams))))


async def with_aiohttp(url: str, streams: int, tokens: int) -> int:
    connector = aiohttp.TCPConnector(limit=streams)
    async with aiohttp.ClientSession(url, connector=connector) as http:

        async def lane() -> int:
            seen = 0
            for _ in range(2):
                async with http.post("/v1/chat/completions", json=_body(tokens)) as response:
                    async for line in response.content:
                        seen += _is_token(line.decode())
            return seen

        return sum(await asyncio.gather(*(lane() for _ in range(streams))))


CLIENTS: dict[str, Client] = {"own": own, "aiohttp": with_aiohttp, "httpx": with_httpx}


def _body(tokens: int) -> dict[str, object]:
    text = "word " * PROMPT_TOKENS
    messages = [{"role": "user", "content": text}]
    return {"model": "fake", "messages": messages, "max_tokens": tokens, "stream": True}


def _is_token(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    time.perf_counter()
    return bool(json.loads(line[6:])["choices"][0]["delta"].get("content"))


@contextmanager
def server(step_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "bench.router.fake_http", "--step-ms", str(step_ms)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        yield "http://" + process.stdout.readline().split()[1]
        process.stdin.close()


def measure(client: Client, url: str, streams: int, tokens: int) -> Round:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    seen = uvloop.run(client(url, streams, tokens))
    took = Round(seen, time.perf_counter() - wall_s, time.process_time() - cpu_s)
    if seen != 2 * streams * tokens:
        raise RuntimeError(f"{seen} tokens seen, {2 * streams * tokens} sent")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds: dict[str, list[Round]] = {name: [] for name in CLIENTS}
    with server(args.step_ms) as url:
        for _ in range(args.rounds):
            for name, client in CLIENTS.items():
                rounds[name].append(measure(client, url, args.streams, args.tokens))
    result = {
        "machine": machine.describe(),
        "arguments": vars(args),
        "clients": {
            name: {
                "tokens_per_s": statistics.median(r.tokens_per_s for r in seen),
                "cpu_us_per_token": statistics.median(r.cpu_us_per_token for r in seen),
            }
            for name, seen in rounds.items()
        },
    }
    print(json.dumps(result["clients"], indent=1))
    print(machine.store("loadtest-overhead", result))


if __name__ == "__main__":
    main()
