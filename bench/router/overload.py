"""Three times the capacity at the door: who gets in, whether promises are kept, how fast the others
are told, and who gets how much.

    slo       one class with targets, offered 0.5, 1 and 3 times the capacity; prompts that keep the
              prefill pool busy, and outputs that keep the decode pool busy, first all of a sudden
    static    the same load against a fixed number of requests at a time, refused beyond it, for
              several such numbers: the best of them is what admission is compared with
    fairness, return    `overload_shares`

The router is a process of its own on its default settings, over workers that take the time of
computing (`modelled_worker`).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.cli.model import import_default
from bench.router.contenders import Children, Contender, Workers, children, ours
from bench.router.overload_load import (
    DECODE_BOUND,
    INTERACTIVE,
    ITL_MS,
    NUM_EACH,
    PREFILL_BOUND,
    PROMPT_S,
    SEQUENCE_US,
    TOKEN_US,
    Client,
    Workload,
    arrivals,
    percentile_ms,
    share_of,
    watched,
)
from bench.router.overload_shares import fairness_row, return_row

SETTLE_S = 20.0
STATIC_LIMITS = {PREFILL_BOUND: (16, 20, 24), DECODE_BOUND: (34, 36, 38)}
"""Requests at a time, round what the model of the workers says is best."""


@dataclass(frozen=True, slots=True)
class SloRow:
    bottleneck: str
    load: float
    """Of the capacity."""
    capacity_per_s: float
    offered_per_s: float
    admitted_per_s: float
    goodput_per_s: float
    """Requests that kept both targets."""
    attainment: float | None
    """Their share of those admitted."""
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p99_ms: float | None
    refused: int
    refused_p50_ms: float | None
    refused_p99_ms: float | None
    refused_within_50_ms: float | None
    """Of arrival, as the client sees it: share of all that were refused."""
    router_within_50_ms: float | None
    """The same by the router's clock: without connections, and clients that are late themselves."""
    refused_waiting: int
    """Those that had been let wait for their turn."""
    waiting_within_50_ms: float | None
    """Their share that was told so soon after their turn was out of reach."""
    max_queued: int
    num_failed: int
    """Neither answered nor refused."""


@dataclass(frozen=True, slots=True)
class StaticRow:
    bottleneck: str
    limit: int
    """Requests at a time."""
    admitted_per_s: float
    goodput_per_s: float
    attainment: float | None
    num_failed: int


async def slo_row(
    router: Contender, workload: Workload, load: float, seconds: float, seed: int
) -> SloRow:
    client = Client(router, workload, random.Random(seed))
    rate = load * workload.capacity_per_s
    async with watched(router) as watch:
        await asyncio.gather(*await arrivals(client, rate, seconds, INTERACTIVE))
    served = [a for a in client.answers if a.is_served]
    refused_s = [a.answered_s for a in client.answers if a.status == 429]
    return SloRow(
        bottleneck=workload.bottleneck,
        load=load,
        capacity_per_s=workload.capacity_per_s,
        offered_per_s=len(client.answers) / seconds,
        admitted_per_s=len(served) / seconds,
        goodput_per_s=sum(a.is_kept for a in served) / seconds,
        attainment=share_of(a.is_kept for a in served),
        ttft_p50_ms=percentile_ms([a.first_s for a in served], 0.5),
        ttft_p99_ms=percentile_ms([a.first_s for a in served], 0.99),
        itl_p99_ms=percentile_ms([a.itl_s for a in served], 0.99),
        refused=len(refused_s),
        refused_p50_ms=percentile_ms(refused_s, 0.5),
        refused_p99_ms=percentile_ms(refused_s, 0.99),
        refused_within_50_ms=share_of(s <= PROMPT_S for s in refused_s),
        router_within_50_ms=watch.refusals("arrival")[1],
        refused_waiting=watch.refusals("unreachable")[0],
        waiting_within_50_ms=watch.refusals("unreachable")[1],
        max_queued=watch.max_queued,
        num_failed=len(client.answers) - len(served) - len(refused_s),
    )


async def static_row(
    router: Contender, workload: Workload, limit: int, seconds: float, seed: int
) -> StaticRow:
    """Three times the capacity; the limit is that of a tenant of its own, without targets."""
    client = Client(router, workload, random.Random(seed))
    headers = {"X-SLO-Class": "standard", "X-Tenant-Id": _static_tenant(limit)}
    rate = 3 * workload.capacity_per_s
    await asyncio.gather(*await arrivals(client, rate, seconds, headers))
    served = [a for a in client.answers if a.is_served]
    num_refused = sum(a.status == 429 for a in client.answers)
    return StaticRow(
        bottleneck=workload.bottleneck,
        limit=limit,
        admitted_per_s=len(served) / seconds,
        goodput_per_s=sum(a.is_kept for a in served) / seconds,
        attainment=share_of(a.is_kept for a in served),
        num_failed=len(client.answers) - len(served) - num_refused,
    )


def _static_tenant(limit: int) -> str:
    return f"static-{limit}"


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
        settings += [
            f"tenants.named.{_static_tenant(limit)}.max_concurrent={limit}"
            for limits in STATIC_LIMITS.values()
            for limit in limits
        ]
        router = ours(group, workers, model_path, log, *settings)
        seconds = 10 * args.seconds
        asyncio.run(slo_row(router, PREFILL_BOUND, 0.5, seconds / 2, args.seed))
        rows["slo"] = []
        for workload, load in (
            (PREFILL_BOUND, 0.5), (PREFILL_BOUND, 1.0), (PREFILL_BOUND, 3.0),
            (DECODE_BOUND, 3.0), (DECODE_BOUND, 1.0), (DECODE_BOUND, 3.0),
        ):  # fmt: skip
            lasts_s = seconds * _stretch(workload)
            row = asyncio.run(slo_row(router, workload, load, lasts_s, args.seed + 1))
            rows["slo"].append(asdict(row))
            _show("slo", rows["slo"][-1:])
        rows["static"] = _static_rows(router, seconds, args.seed + 1)
        rows["against_static"] = _against_static(rows["slo"], rows["static"])
        _show("against the best static limit", rows["against_static"])
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


def _stretch(workload: Workload) -> int:
    """Long outputs take long to show how many end at a time."""
    return 2 if workload is DECODE_BOUND else 1


def _static_rows(router: Contender, seconds: float, seed: int) -> list[dict[str, Any]]:
    rows = []
    for workload, limits in STATIC_LIMITS.items():
        for limit in limits:
            lasts_s = seconds * _stretch(workload)
            row = asyncio.run(static_row(router, workload, limit, lasts_s, seed))
            rows.append(asdict(row))
            _show("static", rows[-1:])
    return rows


def _against_static(
    slo: list[dict[str, Any]], static: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Goodput at three times the capacity by that of the best static limit."""
    rows = []
    for row in (row for row in slo if row["load"] == 3.0):
        best = max(
            (s for s in static if s["bottleneck"] == row["bottleneck"]),
            key=lambda s: s["goodput_per_s"],
        )
        rows.append(
            {
                "bottleneck": row["bottleneck"],
                "goodput_per_s": row["goodput_per_s"],
                "best_static_per_s": best["goodput_per_s"],
                "best_limit": best["limit"],
                "ratio": row["goodput_per_s"] / best["goodput_per_s"]
                if best["goodput_per_s"]
                else None,
            }
        )
    return rows


def _workers(group: Children, model: str) -> Workers:
    command = [sys.executable, "-m", "bench.router.modelled_worker", "--model", model]
    command += ["--prefill", str(NUM_EACH), "--decode", str(NUM_EACH)]
    command += ["--token-us", str(TOKEN_US), "--itl-ms", str(ITL_MS)]
    command += ["--sequence-us", str(SEQUENCE_US)]
    addresses = group.ready_address(group.start(command, os.environ)).split(",")
    return Workers(tuple(addresses[:NUM_EACH]), tuple(addresses[NUM_EACH:]))


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for row in rows:
        cells = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print("  " + "  ".join(cells), flush=True)
