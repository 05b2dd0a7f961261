"""Clients of an overloaded router: what they send, what they see, what its metrics say meanwhile.

Requests arrive as a Poisson process, whatever the answers; prompts are unique, so nothing is
cached. Latencies are those of the client, connection included.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx

from bench.router.contenders import Contender

TOKEN_US, ITL_MS, SEQUENCE_US, NUM_EACH = 100.0, 10.0, 2000.0, 2
TTFT_MS, SLO_ITL_MS = 1000, 50
PROMPT_S = 0.05
"""Within which a client that is sent away has to know it."""
MAX_TOKEN_ID = 1000
TIMEOUT_S = 60.0
QUEUE_PERIOD_S = 0.25


INTERACTIVE = {
    "X-SLO-Class": "interactive",
    "X-SLO-TTFT-Ms": str(TTFT_MS),
    "X-SLO-ITL-Ms": str(SLO_ITL_MS),
}


class Workload(NamedTuple):
    """Mean lengths."""

    bottleneck: str
    prompt_tokens: int
    output_tokens: int

    @property
    def capacity_per_s(self) -> float:
        """Requests that both pools can do within the targets."""
        prefill = NUM_EACH / (self.prompt_tokens * TOKEN_US / 1e6)
        batch = (SLO_ITL_MS - ITL_MS) * 1000 / SEQUENCE_US
        decode = NUM_EACH * batch / (self.output_tokens * SLO_ITL_MS / 1000)
        return min(prefill, decode)


PREFILL_BOUND = Workload("prefill", 1000, 32)
DECODE_BOUND = Workload("decode", 100, 200)


@dataclass(slots=True)
class Answer:
    """One request as its client saw it. Seconds."""

    tenant: str
    num_prompt_tokens: int
    status: int = 0
    sent_at_s: float = 0.0
    first_s: float = math.nan
    """To the first event."""
    answered_s: float = math.nan
    """To the status line."""
    ended_at_s: float = math.nan
    num_tokens: int = 0
    retry_after_s: float = math.nan

    @property
    def itl_s(self) -> float:
        return (self.ended_at_s - self.sent_at_s - self.first_s) / max(1, self.num_tokens - 1)

    @property
    def is_served(self) -> bool:
        return self.status == 200 and not math.isnan(self.ended_at_s)

    @property
    def is_kept(self) -> bool:
        """Both targets were met."""
        return self.is_served and self.first_s <= TTFT_MS / 1000 and self.itl_s <= SLO_ITL_MS / 1000


@dataclass(slots=True)
class Client:
    """Sends completions to a router."""

    router: Contender
    workload: Workload
    rng: random.Random
    answers: list[Answer] = field(default_factory=list)

    async def ask(self, headers: Mapping[str, str], tenant: str = "") -> Answer:
        mean_prompt, mean_output = self.workload.prompt_tokens, self.workload.output_tokens
        num_prompt = max(16, int(self.rng.gauss(mean_prompt, mean_prompt / 4)))
        prompt = self.rng.choices(range(MAX_TOKEN_ID), k=num_prompt)
        max_tokens = self.rng.randint(2, 2 * mean_output - 2)
        body = json.dumps(
            {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0}
        ).encode()
        answer = Answer(tenant, num_prompt, sent_at_s=time.perf_counter())
        self.answers.append(answer)
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(TIMEOUT_S):
                await _exchange(self.router.address, body, headers, answer)
        return answer


async def _exchange(address: str, body: bytes, headers: Mapping[str, str], answer: Answer) -> None:
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{''.join(lines)}\r\n"
        )
        writer.write(head.encode() + body)
        reply = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        now_s = time.perf_counter()
        answer.answered_s, answer.status = now_s - answer.sent_at_s, int(reply.split(" ", 2)[1])
        for line in reply.split("\r\n"):
            if line.startswith("retry-after-ms:"):
                answer.retry_after_s = float(line.split(":")[1]) / 1000
        await _read_events(reader, answer)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, answer: Answer) -> None:
    while data := await reader.read(1 << 16):
        events = data.count(b'"text":"') - data.count(b'"text":""')
        if events and math.isnan(answer.first_s):
            answer.first_s = time.perf_counter() - answer.sent_at_s
        answer.num_tokens += events
        if b"data: [DONE]" in data:
            answer.ended_at_s = time.perf_counter()


class RouterWatch:
    """What the router's metrics show while load runs."""

    def __init__(self, router: Contender) -> None:
        self._url = f"http://{router.address}/metrics"
        self.max_queued = 0
        self._before: dict[str, float] = {}
        self._now: dict[str, float] = {}

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            while True:
                await self.look(client)
                await asyncio.sleep(QUEUE_PERIOD_S)

    async def look(self, client: httpx.AsyncClient) -> None:
        """Once; the first look is what later ones are compared with."""
        queued, counts = 0.0, {}
        for line in (await client.get(self._url)).text.splitlines():
            if line.startswith("baton_admission_queue_requests{"):
                queued += float(line.split()[-1])
            elif line.startswith("baton_admission_refusal_seconds_"):
                name, value = line.rsplit(" ", 1)
                counts[name] = float(value)
        self.max_queued = max(self.max_queued, int(queued))
        self._before = self._before or counts
        self._now = counts

    def refusals(self, since: str) -> tuple[int, float | None]:
        """Number, and share within `PROMPT_S`, by the router's own clock: of all by their arrival,
        or of those that were let wait by the moment from which their turn could not come in
        time (`unreachable`)."""
        family, label = "baton_admission_refusal_seconds", f'since="{since}"'
        total = self._new(f"{family}_count", label)
        in_time = self._new(f"{family}_bucket", label, f'le="{PROMPT_S:g}"')
        return int(total), in_time / total if total else None

    def _new(self, *parts: str) -> float:
        """Increase of the one series whose name has these parts."""
        names = [n for n in self._now if all(part in n for part in parts)]
        return sum(self._now[n] - self._before.get(n, 0.0) for n in names)


@contextlib.asynccontextmanager
async def watched(router: Contender) -> AsyncIterator[RouterWatch]:
    watch = RouterWatch(router)
    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
        await watch.look(client)
        task = asyncio.create_task(watch.run())
        try:
            yield watch
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await watch.look(client)


async def arrivals(
    client: Client,
    rate_per_s: float,
    seconds: float,
    headers: Mapping[str, str],
    tenant: str = "",
) -> list[asyncio.Task[Answer]]:
    """Start requests as a Poisson process; they go on when this returns."""
    tasks = []
    at_s = time.perf_counter()
    until_s = at_s + seconds
    while (at_s := at_s + client.rng.expovariate(rate_per_s)) < until_s:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask(headers, tenant)))
    return tasks


def share_of(values: Iterable[bool]) -> float | None:
    flags = list(values)
    return sum(flags) / len(flags) if flags else None


def percentile_ms(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]
