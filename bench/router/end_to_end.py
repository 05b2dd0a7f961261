"""Routers end to end over workers that compute nothing: latency, requests, tokens, memory.

All contenders are up at once, and every figure is the median of interleaved rounds.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import string
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import grpc

from baton.core.worker_info import PROTOCOL_VERSION
from baton.rpc.channel import open_channel
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1.worker_pb2_grpc import WorkerStub
from bench.router.contenders import Contender
from bench.router.load import Seen, chat_body, run_load

CONCURRENCIES = (1, 16, 64)
STREAM_CONCURRENCIES = (1, 128)
STREAM_TOKENS = 128
LONG_PROMPT_BYTES = 32 << 10
LONG_PROMPT_CONCURRENCY = 64
"""What requests leave behind shows with many at a time: a collector then finds them in use."""
CALL_TIMEOUT_S = 10.0
Row = TypeVar("Row", "Answers", "Streams")


@dataclass(frozen=True, slots=True)
class Answers:
    """One-token answers at one concurrency."""

    contender: str
    concurrency: int
    p50_ms: float
    p99_ms: float
    requests_per_s: float
    cpu_us_per_request: float
    num_failed: int


@dataclass(frozen=True, slots=True)
class Streams:
    contender: str
    concurrency: int
    tokens_per_s: float
    """As seen on this machine, whose cores the workers and the load take a share of."""
    cpu_us_per_token: float
    """Of the router; a million over it is what one core of its own would carry."""
    first_token_p50_ms: float
    first_token_p99_ms: float
    gap_p50_ms: float
    """Between what a client reads at a time: a step of the workers while tokens come singly."""
    gap_p99_ms: float
    num_failed: int


async def answers(
    contenders: Iterable[Contender], concurrency: int, *, rounds: int, seconds: float
) -> list[Answers]:
    """Short one-token completions."""
    results: dict[str, list[Answers]] = {}
    for _ in range(rounds):
        for contender in contenders:
            body = chat_body(contender.model, "Hello there", max_tokens=1)
            before_s = contender.cpu_s()
            seen = await run_load(
                contender.address, lambda _, b=body: b, concurrency=concurrency, seconds=seconds
            )
            row = _answers(contender.name, concurrency, seen, contender.cpu_s() - before_s)
            results.setdefault(contender.name, []).append(row)
    return [_median(rows) for rows in results.values()]


async def streams(
    contenders: Iterable[Contender], concurrency: int, *, rounds: int, seconds: float
) -> list[Streams]:
    """Streams of `STREAM_TOKENS` tokens each, as many at a time as `concurrency`."""
    results: dict[str, list[Streams]] = {}
    for _ in range(rounds):
        for contender in contenders:
            body = chat_body(contender.model, "Hi", max_tokens=STREAM_TOKENS, stream=True)
            before_s = contender.cpu_s()
            seen = await run_load(
                contender.address, lambda _, b=body: b, concurrency=concurrency, seconds=seconds
            )
            row = _streams(contender.name, concurrency, seen, contender.cpu_s() - before_s)
            results.setdefault(contender.name, []).append(row)
    return [_median(rows) for rows in results.values()]


async def memory(
    contenders: Iterable[Contender], *, num_prompts: int, seconds: float, seed: int
) -> list[dict[str, Any]]:
    """Resident memory before and after unique long prompts."""
    rows = []
    for contender in contenders:
        before = contender.rss_bytes()
        before_s = contender.cpu_s()
        seen = await run_load(
            contender.address,
            _long_prompts(contender.model, seed),
            concurrency=LONG_PROMPT_CONCURRENCY,
            seconds=seconds,
            max_requests=num_prompts,
        )
        num = max(1, len(seen.latencies_s))
        rows.append(
            {
                "contender": contender.name,
                "num_prompts": num,
                "rss_before_bytes": before,
                "rss_after_bytes": contender.rss_bytes(),
                "cpu_us_per_prompt": 1e6 * (contender.cpu_s() - before_s) / num,
                "p50_ms": seen.percentile_ms(seen.latencies_s, 0.5),
                "num_failed": seen.num_failed,
            }
        )
    return rows


async def direct_session(address: str, *, seconds: float) -> dict[str, float]:
    """One request at a time straight to a worker over the session protocol: the floor."""
    channel = open_channel(address, None)
    call = WorkerStub(channel).Session()
    latencies_s: list[float] = []
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S + seconds):
            hello = pb.Hello(router_id="direct", protocol_version=PROTOCOL_VERSION)
            await call.write(pb.RouterMessage(hello=hello))
            await call.read()
            until_s = time.perf_counter() + seconds
            while time.perf_counter() < until_s:
                latencies_s.append(await _one_call(call, f"direct.{len(latencies_s)}"))
    finally:
        call.cancel()
        await channel.close()
    seen = Seen(latencies_s)
    return {
        "p50_ms": seen.percentile_ms(latencies_s, 0.5),
        "p99_ms": seen.percentile_ms(latencies_s, 0.99),
    }


async def _one_call(call: grpc.aio.StreamStreamCall, wire_id: str) -> float:
    sent_s = time.perf_counter()
    submit = pb.Submit(request_id=wire_id, work=pb.WORK_GENERATE, prompt_token_ids=range(10))
    submit.sampling.max_tokens = 1
    await call.write(pb.RouterMessage(submit=submit))
    while not (await call.read()).step.deltas:
        pass
    return time.perf_counter() - sent_s


def _long_prompts(model: str, seed: int) -> Callable[[int], bytes]:
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase, k=7)) for _ in range(4096)]

    def make(number: int) -> bytes:
        text = f"{number} " + " ".join(rng.choices(words, k=LONG_PROMPT_BYTES // 8))
        return chat_body(model, text, max_tokens=1)

    return make


def _answers(name: str, concurrency: int, seen: Seen, cpu_s: float) -> Answers:
    num = max(1, len(seen.latencies_s))
    return Answers(
        name,
        concurrency,
        seen.percentile_ms(seen.latencies_s, 0.5),
        seen.percentile_ms(seen.latencies_s, 0.99),
        len(seen.latencies_s) / seen.wall_s,
        1e6 * cpu_s / num,
        seen.num_failed,
    )


def _streams(name: str, concurrency: int, seen: Seen, cpu_s: float) -> Streams:
    num_tokens = max(1, len(seen.latencies_s) * STREAM_TOKENS)
    return Streams(
        name,
        concurrency,
        num_tokens / seen.wall_s,
        1e6 * cpu_s / num_tokens,
        seen.percentile_ms(seen.first_s, 0.5),
        seen.percentile_ms(seen.first_s, 0.99),
        seen.percentile_ms(seen.gaps_s, 0.5),
        seen.percentile_ms(seen.gaps_s, 0.99),
        seen.num_failed,
    )


def _median(rows: list[Row]) -> Row:
    """Field by field; failures are summed."""
    first = asdict(rows[0])
    values: dict[str, Any] = {}
    for name, value in first.items():
        column = [getattr(row, name) for row in rows]
        values[name] = statistics.median(column) if isinstance(value, float) else value
    values["num_failed"] = sum(row.num_failed for row in rows)
    return type(rows[0])(**values)
