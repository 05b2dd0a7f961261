"""Who gets how much of an overloaded router, and who gets in when they come back.

fairness  a class without targets, two tenants, the heavy one with most of the load: work served
          while both wait
return    a burst at once; everybody who was sent away comes back when told
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass

from bench.router.contenders import Contender
from bench.router.overload_load import (
    INTERACTIVE,
    PREFILL_BOUND,
    Answer,
    Client,
    arrivals,
    share_of,
    watched,
)

WARM_UP_S = 5.0


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


async def fairness_row(
    router: Contender, seconds: float, seed: int, *, weights: tuple[float, float]
) -> FairnessRow:
    """Ten to one in requests, each more than its share; the queue is given up at the end."""
    names = tuple(f"tenant-{i}-{w:g}" for i, w in enumerate(weights))
    loads = (10.0, 1.0)
    clients = [Client(router, PREFILL_BOUND, random.Random(seed + i)) for i in range(2)]
    capacity = PREFILL_BOUND.capacity_per_s
    started_s = time.perf_counter()
    async with watched(router) as watch:
        batches = await asyncio.gather(
            *(
                arrivals(client, load * capacity, seconds, {"X-Tenant-Id": name}, name)
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

    async def insist() -> list[Answer]:
        tries = [await client.ask(INTERACTIVE)]
        while tries[-1].status == 429 and len(tries) < 20:
            await asyncio.sleep(tries[-1].retry_after_s)
            tries.append(await client.ask(INTERACTIVE))
        return tries

    started_s = time.perf_counter()
    histories = await asyncio.gather(*(insist() for _ in range(burst)))
    away = [tries for tries in histories if len(tries) > 1]
    return ReturnRow(
        burst=burst,
        rejected=len(away),
        first_return_admitted=share_of(tries[1].status == 200 for tries in away),
        max_tries=max(map(len, histories)),
        all_served_after_s=time.perf_counter() - started_s,
    )
