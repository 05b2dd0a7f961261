"""Three times the capacity at the door: who gets in, whether promises are kept, how fast the others
are told, and who gets how much.

    slo       one class with targets, offered 0.5, 1 and 3 times the capacity; prompts that keep the
              prefill pool busy, and outputs that keep the decode pool busy
    fairness  a class without targets, two tenants, the heavy one with most of the load: work served
              while both wait
    return    a burst at once; everybody who was sent away comes back when told

The router is a process of its own on its default settings, over workers that take the time of
computing (`modelled_worker`). Requests arrive as a Poisson process, whatever the answers; prompts
are unique, so nothing is cached. Latencies are those of the client, connection included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from baton.cli.model import import_default
from bench.router.contenders import Children, Contender, Workers, children, ours

TOKEN_US, ITL_MS, SEQUENCE_US, NUM_EACH = 100.0, 10.0, 2000.0, 2
TTFT_MS, SLO_ITL_MS = 1000, 50
MAX_TOKEN_ID = 1000
TIMEOUT_S = 60.0
SETTLE_S = 20.0
QUEUE_PERIOD_S = 0.25
WARM_UP_S = 5.0


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


@dataclass(frozen=True, slots=True)
class SloRow:
    bottleneck: str
    load: float
    """Of the capacity."""
    offered_per_s: float
    admitted_per_s: float
    attainment: float | None
    """Share of admitted requests that kept both targets."""
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p99_ms: float | None
    rejected: int
    reject_p50_ms: float | None
    reject_p99_ms: float | None
    rejected_within_50_ms: float | None
    """Share of all that were refused; the others had waited for a place first."""
    max_queued: int
    num_failed: int
    """Neither answered nor refused."""


@dataclass(frozen=True, slots=True)
class FairnessRow:
    tenants: str
    offered: str
    """Of the capacity, by each."""
    weights: str
    served_share: str
    """Of the work done while both waited."""
    max_queued: int


@dataclass(frozen=True, slots=True)
class ReturnRow:
    burst: int
    rejected: int
    """Of the burst."""
    first_return_admitted: float | None
    """Share of those sent away that got in when they first came back."""
    max_tries: int
    all_served_after_s: float


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


class QueueWatch:
    """The longest queue that the router's metrics have shown."""

    def __init__(self, router: Contender) -> None:
        self._url = f"http://{router.address}/metrics"
        self.max_queued = 0
        self.num_queued = 0

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            while True:
                lines = (await client.get(self._url)).text.splitlines()
                name = "baton_admission_queue_requests{"
                queued = [float(line.split()[-1]) for line in lines if line.startswith(name)]
                self.num_queued = int(sum(queued))
                self.max_queued = max(self.max_queued, self.num_queued)
                await asyncio.sleep(QUEUE_PERIOD_S)


@contextlib.asynccontextmanager
async def _watched(router: Contender) -> AsyncIterator[QueueWatch]:
    watch = QueueWatch(router)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _arrivals(
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


TARGETS = {"X-SLO-TTFT-Ms": str(TTFT_MS), "X-SLO-ITL-Ms": str(SLO_ITL_MS)}


async def slo_row(
    router: Contender, workload: Workload, load: float, seconds: float, seed: int
) -> SloRow:
    client = Client(router, workload, random.Random(seed))
    rate = load * workload.capacity_per_s
    async with _watched(router) as watch:
        tasks = await _arrivals(client, rate, seconds, {"X-SLO-Class": "interactive", **TARGETS})
        await asyncio.gather(*tasks)
    served = [a for a in client.answers if a.is_served]
    rejected = [a for a in client.answers if a.status == 429]
    refusals_s = [a.answered_s for a in rejected]
    return SloRow(
        bottleneck=workload.bottleneck,
        load=load,
        offered_per_s=len(client.answers) / seconds,
        admitted_per_s=len(served) / seconds,
        attainment=_share(a.is_kept for a in served),
        ttft_p50_ms=_percentile_ms([a.first_s for a in served], 0.5),
        ttft_p99_ms=_percentile_ms([a.first_s for a in served], 0.99),
        itl_p99_ms=_percentile_ms([a.itl_s for a in served], 0.99),
        rejected=len(rejected),
        reject_p50_ms=_percentile_ms(refusals_s, 0.5),
        reject_p99_ms=_percentile_ms(refusals_s, 0.99),
        rejected_within_50_ms=_share(s <= 0.05 for s in refusals_s),
        max_queued=watch.max_queued,
        num_failed=len(client.answers) - len(served) - len(rejected),
    )


async def fairness_row(
    router: Contender, seconds: float, seed: int, *, weights: tuple[float, float]
) -> FairnessRow:
    """Ten to one in requests, each more than its share; the queue is given up at the end."""
    names = tuple(f"tenant-{i}-{w:g}" for i, w in enumerate(weights))
    loads = (10.0, 1.0)
    clients = [Client(router, PREFILL_BOUND, random.Random(seed + i)) for i in range(2)]
    capacity = PREFILL_BOUND.capacity_per_s
    started_s = time.perf_counter()
    async with _watched(router) as watch:
        batches = await asyncio.gather(
            *(
                _arrivals(client, load * capacity, seconds, {"X-Tenant-Id": name}, name)
                for client, load, name in zip(clients, loads, names, strict=True)
            )
        )
        until_s = time.perf_counter()
        max_queued = watch.max_queued
        for task in (task for tasks in batches for task in tasks):
            task.cancel()
        await asyncio.gather(*(t for tasks in batches for t in tasks), return_exceptions=True)
    work = Counter[str]()
    for answer in (a for client in clients for a in client.answers):
        if answer.is_served and started_s + WARM_UP_S < answer.ended_at_s <= until_s:
            work[answer.tenant] += answer.num_prompt_tokens + 2 * answer.num_tokens
    total = sum(work.values())
    return FairnessRow(
        tenants="heavy : light",
        offered=" : ".join(f"{load:g}" for load in loads),
        weights=" : ".join(f"{w:g}" for w in weights),
        served_share=" : ".join(f"{work[name] / total:.3f}" for name in names),
        max_queued=max_queued,
    )


async def return_row(router: Contender, burst: int, seed: int) -> ReturnRow:
    client = Client(router, PREFILL_BOUND, random.Random(seed))
    headers = {"X-SLO-Class": "interactive", **TARGETS}

    async def insist() -> list[Answer]:
        tries = [await client.ask(headers)]
        while tries[-1].status == 429 and len(tries) < 20:
            await asyncio.sleep(tries[-1].retry_after_s)
            tries.append(await client.ask(headers))
        return tries

    started_s = time.perf_counter()
    histories = await asyncio.gather(*(insist() for _ in range(burst)))
    away = [tries for tries in histories if len(tries) > 1]
    return ReturnRow(
        burst=burst,
        rejected=len(away),
        first_return_admitted=_share(tries[1].status == 200 for tries in away),
        max_tries=max(map(len, histories)),
        all_served_after_s=time.perf_counter() - started_s,
    )


def run_overload(args: argparse.Namespace) -> dict[str, Any]:
    """Returns rows as JSON; prints them."""
    model_path: Path = args.model or import_default(os.environ, dtype="float32")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, children() as group:
        workers = _workers(group, model_path.resolve().name)
        log = Path(folder) / "router.log"
        settings = ["tenants.trust_tenant_header=true"]
        settings += [
            f"tenants.named.tenant-{i}-{w:g}.weight={w:g}" for i, w in ((1, 3.0), (0, 1.0))
        ]
        router = ours(group, workers, model_path, log, *settings)
        seconds = 10 * args.seconds
        asyncio.run(slo_row(router, PREFILL_BOUND, 0.5, seconds / 2, args.seed))
        rows["slo"] = []
        for workload, load in (
            (PREFILL_BOUND, 0.5), (PREFILL_BOUND, 1.0), (PREFILL_BOUND, 3.0),
            (DECODE_BOUND, 1.0), (DECODE_BOUND, 3.0),
        ):  # fmt: skip
            # Long outputs take long to show how many end at a time.
            lasts_s = seconds * (2 if workload is DECODE_BOUND else 1)
            row = asyncio.run(slo_row(router, workload, load, lasts_s, args.seed + 1))
            rows["slo"].append(asdict(row))
        _show("slo", rows["slo"])
        time.sleep(SETTLE_S / 4)
        rows["return"] = [asdict(asyncio.run(return_row(router, 100, args.seed)))]
        _show("return", rows["return"])
        rows["fairness"] = []
        for weights in ((1.0, 1.0), (1.0, 3.0)):
            shares = asyncio.run(fairness_row(router, seconds, args.seed, weights=weights))
            rows["fairness"].append(asdict(shares))
            time.sleep(SETTLE_S / 4)
        _show("fairness", rows["fairness"])
    return rows


def _workers(group: Children, model: str) -> Workers:
    command = [sys.executable, "-m", "bench.router.modelled_worker", "--model", model]
    command += ["--prefill", str(NUM_EACH), "--decode", str(NUM_EACH)]
    command += ["--token-us", str(TOKEN_US), "--itl-ms", str(ITL_MS)]
    command += ["--sequence-us", str(SEQUENCE_US)]
    addresses = group.ready_address(group.start(command, os.environ)).split(",")
    return Workers(tuple(addresses[:NUM_EACH]), tuple(addresses[NUM_EACH:]))


def _share(values: Iterable[bool]) -> float | None:
    flags = list(values)
    return sum(flags) / len(flags) if flags else None


def _percentile_ms(values: Sequence[float], share: float) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print("  " + "  ".join(cells), flush=True)
