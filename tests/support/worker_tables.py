"""Tables of workers for tests of placement, built from a few words each."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from baton.core.kv_layout import KvLayout
from baton.core.tier import Tier
from baton.core.worker_info import Epoch, LoadReport, Role, WorkerId, WorkerInfo
from services.router.index.prefix_match import PrefixMatch
from services.router.placement.load_book import LoadBook
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement, PlacementRequest
from services.router.placement.policy import Hits, Noise, place
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.topology import LinkPrices
from services.router.placement.worker_table import WorkerTable

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")
MODEL = "m"
Lengths = Mapping[str, int | tuple[int, int, int]]
"""Blocks by worker, on the device or in each tier or a better one."""


def worker_info(
    name: str,
    *,
    layout: KvLayout = LAYOUT,
    model: str = MODEL,
    max_len: int = 100_000,
    max_seqs: int = 256,
    host: str | None = None,
    epoch: str = "1",
) -> WorkerInfo:
    """`p...` is a prefill worker, any other name a decode worker."""
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    address = f"{host or 'host-' + name}:1"
    return WorkerInfo(
        WorkerId(name), Epoch(epoch), role, address, model, layout, 10_000, max_len, max_seqs,
        "fake", 1,
    )  # fmt: skip


def load_report(**load: int | bool) -> LoadReport:
    """Of a worker with plenty of room, unless `load` says otherwise."""
    return LoadReport(**{"free_blocks": 10_000, "total_blocks": 10_000, **load})  # type: ignore[arg-type]


@dataclass
class Cluster:
    """A table with its books; places requests of its model."""

    config: PolicyConfig = field(default_factory=PolicyConfig)
    perf: PerfModel = field(default_factory=PerfModel)
    table: WorkerTable = field(init=False)
    books: dict[str, LoadBook] = field(default_factory=dict)
    slots: dict[WorkerId, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = WorkerTable(LinkPrices.from_config(self.config))

    def add(self, name: str, info: Mapping[str, object] | None = None, **load: int | bool) -> None:
        book = self.books[name] = LoadBook()
        book.report(load_report(**load), 0.0)
        self.slots[WorkerId(name)] = len(self.slots)
        self.table.join(
            worker_info(name, **(info or {})),  # type: ignore[arg-type]
            book,
            slot=self.slots[WorkerId(name)],
        )

    def match(self, lengths: Lengths) -> PrefixMatch:
        found = np.zeros((len(Tier), len(self.slots)), np.int32)
        for name, blocks in lengths.items():
            found[:, self.slots[WorkerId(name)]] = blocks
        return PrefixMatch(found, self.slots)

    def place(
        self,
        num_prompt: int = 1000,
        max_tokens: int = 100,
        *,
        cached: Lengths | None = None,
        held: Lengths | None = None,
        avoid: frozenset[str] = frozenset(),
        last: tuple[str, ...] = (),
        seed: int = 0,
        noise: Noise | None = None,
    ) -> Placement:
        """`held`: what workers have said, where `cached` also counts what they were sent."""
        request = PlacementRequest(
            MODEL,
            num_prompt,
            max_tokens,
            avoid=frozenset(map(WorkerId, avoid)),
            last_workers=tuple(map(WorkerId, last)),
        )
        match = self.match(cached or {})
        hits = Hits(match, match if held is None else self.match(held))
        pools = self.table.pools(MODEL)
        return place(
            self.table,
            pools,
            [hits] * len(pools),
            request,
            config=self.config,
            perf=self.perf,
            noise=noise or Noise(random.Random(seed)),
        )


def cluster_of(*names: str, **settings: object) -> Cluster:
    """Idle workers; `settings` of the policy."""
    cluster = Cluster(PolicyConfig(**settings))  # type: ignore[arg-type]
    for name in names:
        cluster.add(name)
    return cluster
