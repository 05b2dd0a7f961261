"""A whole placement: look at the table, match the prompt, decide. By number of workers.

Half of the workers prefill, half decode; the index holds a million blocks of chains that share a
beginning. Nothing is ever found as it was left, in two degrees: between two placements a worker
reports its load and one is sent a request; or, `busy`, all that happens in a router at 500 requests
a second: eight reports, the last request is sent, noted as expected on its worker and marked as
used in the index, and one that has ended teaches the performance model. Garbage is collected as
in a router process. Wall clock and the thread's own CPU time: on a busy machine they differ by what
others took. Parts are timed by themselves afterwards.

    full    a chain that one worker holds, all others its beginning
    part    a stranger with the same beginning
    none    a stranger
    mixed   a conversation that up to four workers hold, each to another depth, in a tenth of the
            cases nobody
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from bench.router.index_workload import HASH_BYTES, PROMPTS, Workload, percentile, split
from services.router.collection import keep_from_collection
from services.router.index.predicted import PredictedPrefixes
from services.router.index.prefix_index import PrefixIndex
from services.router.placement.comparison_policies import make_policy
from services.router.placement.load_book import LoadBook
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement, PlacementRequest
from services.router.placement.policy import Hits
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.topology import LinkPrices
from services.router.placement.worker_table import WorkerTable

NUM_WORKERS = (10, 50, 100, 200)
KINDS = (*PROMPTS, "mixed")
NUM_PLACEMENTS = 4000
NUM_TALKS = 1024
"""Conversations of `mixed`; other prompts do not come twice."""
PLACEMENT_S = 0.002
NUM_REPORTS = 8
ROUND_PLACEMENTS = 500
NUM_WARM_UP = 300
MODEL = "bench"
LAYOUT = KvLayout(MODEL, 32, 8, 128, 16, "bfloat16")
PROMPT_TOKENS = 512 * LAYOUT.block_size + 5
GOALS = {"p99_us": 100.0}


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """Microseconds. `quiet`: the CPU times of the round that others disturbed least."""

    workers: int
    prompt: str
    busy: bool
    p50_us: float
    p99_us: float
    cpu_p50_us: float
    cpu_p99_us: float
    quiet_p50_us: float
    quiet_p99_us: float


@dataclass(frozen=True, slots=True)
class PartRow:
    workers: int
    part: str
    median_us: float


class Scene:
    """A router's pure parts over workers that only report."""

    def __init__(self, num_workers: int, workload: Workload, seed: int = 1) -> None:
        self._rng = random.Random(seed)
        self.config = PolicyConfig()
        self.table = WorkerTable(LinkPrices.from_config(self.config))
        self.index = PrefixIndex(workload.num_entries, max_pending=1 << 14)
        self.predicted = PredictedPrefixes()
        self.perf = PerfModel()
        self.policy = make_policy(self.config, self.perf, self._rng)
        self.books: list[LoadBook] = []
        self.now_s = 0.0
        self.ids = [WorkerId(f"w{n}") for n in range(num_workers)]
        for n, worker_id in enumerate(self.ids):
            role = Role.PREFILL if n < num_workers // 2 else Role.DECODE
            self._join(worker_id, role, host=f"host-{n // 8}")
        for worker, _parent, joined in workload.events():
            self.index.store(self.ids[worker], joined)
        self.index.flush()

    def _join(self, worker_id: WorkerId, role: Role, *, host: str) -> None:
        info = WorkerInfo(
            worker_id, Epoch("1"), role, f"{host}:1", MODEL, LAYOUT, 100_000, 131_072, 256, "nixl",
            1,
        )  # fmt: skip
        self.books.append(LoadBook())
        self.table.join(info, self.books[-1], slot=self.index.slot_of(worker_id))

    def mixed_prompts(self, count: int) -> list[bytes]:
        """Conversations, which this also puts into the index."""
        rng, prompts = self._rng, []
        for _ in range(count):
            prompts.append(rng.randbytes(512 * HASH_BYTES))
            if rng.random() < 0.1:
                continue
            for worker_id in rng.sample(self.ids, rng.randrange(1, 5)):
                num_held = rng.randrange(1, 513)
                self.index.store(worker_id, prompts[-1][: num_held * HASH_BYTES])
        self.index.flush()
        return prompts

    def disturb(self, number: int) -> None:
        """The least that happens between two placements."""
        rng, self.now_s = self._rng, self.now_s + PLACEMENT_S
        load = LoadReport(
            num_running=rng.randrange(64), queued_prefill_tokens=rng.randrange(8000),
            resident_kv_tokens=rng.randrange(500_000), free_blocks=50_000, cached_blocks=10_000,
            total_blocks=100_000, leases=rng.randrange(9),
        )  # fmt: skip
        self.books[number % len(self.books)].report(load, self.now_s)
        book = rng.choice(self.books)
        book.sent(str(number), prefill_tokens=900, kv_tokens=8000, now_s=self.now_s)
        if number >= 64:
            # Ends are as frequent as submits.
            self.books[(number * 7) % len(self.books)].report(load, self.now_s)

    def disturb_much(self, number: int, placement: Placement, joined: bytes) -> None:
        """What else does: the last request is on its way, another one has ended."""
        rng = self._rng
        for _ in range(NUM_REPORTS - 2):
            load = LoadReport(num_running=rng.randrange(64), free_blocks=rng.randrange(50_000))
            rng.choice(self.books).report(load, self.now_s)
        self.index.touch(joined)
        self.predicted.note(joined, placement.computes_prompt, self.now_s)
        uncached = placement.terms_of(placement.computes_prompt).uncached
        perf, half = self.perf, len(self.ids) // 2
        computed, decoded = self.ids[number % half], self.ids[half + number * 7 % half]
        prefill_s = max(1, uncached) * rng.uniform(2e-5, 4e-5)
        perf.observe_prefill(Role.PREFILL, computed, uncached, 512, prefill_s)
        perf.observe_queue(Role.PREFILL, computed, 3000, rng.uniform(0.05, 0.2))
        batch, itl_s = rng.randrange(1, 64), rng.uniform(0.01, 0.05)
        perf.observe_itl(Role.DECODE, decoded, batch, 200_000, itl_s)

    def place(self, hashes: list[bytes]) -> Placement:
        request = PlacementRequest(MODEL, PROMPT_TOKENS, 300)
        pools = self.table.pools(MODEL)
        hits = [self.hits(hashes) for _ in pools]
        return self.policy.place(self.table, pools, hits, request)

    def hits(self, hashes: list[bytes]) -> Hits:
        held = self.index.match(hashes)  # type: ignore[arg-type]
        return Hits(self.predicted.merge(held, hashes, self.now_s), held)  # type: ignore[arg-type]


def run_placement(args: argparse.Namespace) -> dict[str, Any]:
    rows: list[PlacementRow] = []
    parts: list[PartRow] = []
    keep_from_collection()
    for num_workers in NUM_WORKERS:
        workload = Workload("1M blocks", 1_000_000, num_workers=num_workers, seed=args.seed)
        scene = Scene(num_workers, workload, args.seed)
        for kind in KINDS:
            if kind == "mixed":
                prompts = scene.mixed_prompts(NUM_TALKS)
            else:
                prompts = list(workload.prompts(kind, NUM_WARM_UP + NUM_PLACEMENTS))
            for is_busy in (False, True):
                rows.append(_measure(scene, kind, prompts, is_busy=is_busy))
                print(f"  {json.dumps(asdict(rows[-1]))}", flush=True)
        parts += _parts(scene, num_workers, split(next(iter(workload.prompts("full", 1)))))
    for part in parts:
        print(f"  {json.dumps(asdict(part))}", flush=True)
    return {"goals": GOALS, "rows": [*map(asdict, rows)], "parts": [*map(asdict, parts)]}


def _measure(scene: Scene, kind: str, prompts: list[bytes], *, is_busy: bool) -> PlacementRow:
    wall: list[float] = []
    cpu: list[float] = []
    gc.collect()
    for number in range(NUM_WARM_UP + NUM_PLACEMENTS):
        scene.disturb(number)
        joined = prompts[number % len(prompts)]
        # The router has just computed them.
        hashes = split(joined)
        start, cpu_start = time.perf_counter_ns(), time.thread_time_ns()
        placement = scene.place(hashes)
        cpu_end, end = time.thread_time_ns(), time.perf_counter_ns()
        if number >= NUM_WARM_UP:
            wall.append((end - start) / 1000)
            cpu.append((cpu_end - cpu_start) / 1000)
        if is_busy:
            scene.disturb_much(number, placement, joined)
    rounds = [cpu[i : i + ROUND_PLACEMENTS] for i in range(0, len(cpu), ROUND_PLACEMENTS)]
    quiet = min(rounds, key=lambda times: percentile(times, 0.99))
    figures = [round(percentile(of, p), 1) for of in (wall, cpu, quiet) for p in (0.5, 0.99)]
    return PlacementRow(len(scene.ids), kind, is_busy, *figures)


def _parts(scene: Scene, num_workers: int, hashes: list[bytes]) -> Iterable[PartRow]:
    """Those of one placement, and what keeps the table up to date."""
    request = PlacementRequest(MODEL, PROMPT_TOKENS, 300)
    pools, hits = scene.table.pools(MODEL), [scene.hits(hashes)]
    book, load = scene.books[0], LoadReport(queued_prefill_tokens=5)

    def submit_and_end() -> None:
        book.sent("x", prefill_tokens=1, kv_tokens=1, now_s=scene.now_s)
        book.ended("x")

    calls: dict[str, Callable[[], object]] = {
        "match": lambda: scene.hits(hashes),
        "decide": lambda: scene.policy.place(scene.table, pools, hits, request),
        "terms": lambda: list(scene.policy.place(scene.table, pools, hits, request).terms),
        "load report": lambda: book.report(load, scene.now_s),
        "submit and end": submit_and_end,
    }
    for part, call in calls.items():
        times = []
        for _ in range(2000):
            start = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - start) / 1000)
        yield PartRow(num_workers, part, round(percentile(times, 0.5), 2))
