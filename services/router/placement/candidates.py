"""Workers that may take new work, cut out of the table for placement.

A pool holds the workers of one model and one KV layout, whose blocks are interchangeable: prefill
workers first, then decode workers, then those that take no work but whose blocks can be read. All
that does not change with load or request is worked out once, here.

Does not know: load, costs, prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from baton.core.fabric import LinkReport
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Role, WorkerId, WorkerInfo
from services.router.placement.load_book import (
    AVAILABLE,
    LEASES,
    QUEUED,
    RESIDENT,
    SEQUENCES,
    LoadBook,
)
from services.router.placement.speeds import Floats, SpeedBook
from services.router.placement.topology import Topology

MAX_CUTS = 16

COST_ROWS = (QUEUED, SEQUENCES, RESIDENT, SEQUENCES, AVAILABLE)
"""Columns of the table in the rows of `Pool.cost_loads`. All but the last are what `Speeds.load` is
multiplied by; a batch appears twice because it takes time as such and with every token of KV that
a request adds."""
QUEUED_ROW, BATCH_ROW, RESIDENT_ROW, _, AVAILABLE_ROW = range(len(COST_ROWS))
NUM_TIMED_ROWS = AVAILABLE_ROW


@dataclass(slots=True, eq=False)
class WorkerRow:
    """One worker in the table."""

    info: WorkerInfo
    book: LoadBook
    index: int
    slot: int
    """Its column in a prefix match."""
    links: tuple[LinkReport, ...] = ()
    """As the worker last reported them."""
    is_lost: bool = False
    is_leaving: bool = False

    @property
    def is_eligible(self) -> bool:
        return self.is_readable and not (self.is_leaving or self.book.is_draining)

    @property
    def is_readable(self) -> bool:
        """Its engine answers, so its blocks can be leased."""
        return not (self.is_lost or self.book.is_unhealthy)


@dataclass(slots=True, eq=False)
class Pool:
    """Interchangeable workers at one version of the table."""

    layout: KvLayout
    token_bytes: int
    """Of KV, on all ranks together: what a hand-off moves."""
    members: tuple[WorkerRow, ...]
    """Prefill candidates, decode candidates, then those only read from."""
    num_prefill: int
    num_candidates: int
    rows: NDArray[np.intp]
    slots: NDArray[np.intp]
    max_slot: int
    position: dict[WorkerId, int]
    max_model_lens: Floats
    max_num_seqs: Floats
    min_num_seqs: float
    cost_places: NDArray[np.intp]
    """[cost row, candidate] in the flat table."""
    fetch_block_s: Floats
    """[source, reader] per block; sources: all members, readers: all candidates."""
    fetch_latency: Floats
    """Before the first block, the exchange of messages included."""
    pair_seconds: Floats
    """[prefill, decode] per byte of a hand-off."""
    pair_latency: Floats
    """Likewise."""
    min_model_len: float
    speed_book: SpeedBook
    _tail: tuple[int, Floats | None] = (-1, None)
    _cuts: dict[frozenset[int], Pool] = field(default_factory=dict)
    """Pools without a few of the candidates, by their positions: the same workers are avoided for
    as long as they rest."""
    _values: Floats | None = None
    _topology: Topology | None = None

    @property
    def candidates(self) -> list[WorkerInfo]:
        return [member.info for member in self.members[: self.num_candidates]]

    @property
    def num_decode(self) -> int:
        return self.num_candidates - self.num_prefill

    def worker_id(self, position: int) -> WorkerId:
        return self.members[position].info.worker_id

    def loads(self) -> Floats:
        """[num_columns, num_members] as they are now, a copy."""
        assert self._values is not None
        return self._values.take(self.rows, axis=1)

    def cost_loads(self) -> Floats:
        """[cost row, candidate] as they are now, a copy."""
        assert self._values is not None
        loads: Floats = self._values.take(self.cost_places)
        return loads

    def leases(self) -> Floats:
        """[member] as they are now, a copy."""
        assert self._values is not None
        leases: Floats = self._values[LEASES].take(self.rows)
        return leases

    def pair_tail(self, num_tokens: int) -> Floats:
        """[prefill, decode] seconds of a hand-off of so few tokens, all of it exposed."""
        known_tokens, seconds = self._tail
        if known_tokens != num_tokens or seconds is None:
            seconds = self.pair_seconds * (num_tokens * self.token_bytes)
            seconds += self.pair_latency
            # All prompts but the shortest have one tail.
            self._tail = (num_tokens, seconds)
        return seconds

    def without(
        self, *, num_prompt_tokens: int = 0, avoid: Collection[WorkerId] = ()
    ) -> Pool | None:
        """The pool of those whose context holds the prompt and one more token, and who are not in
        `avoid`; the others' blocks can still be read. None when nobody is left."""
        out = {self.position[worker_id] for worker_id in avoid if worker_id in self.position}
        if num_prompt_tokens >= self.min_model_len:
            out.update((self.max_model_lens <= num_prompt_tokens).nonzero()[0].tolist())
        if not out:
            return self
        if len(out) == self.num_candidates:
            return None
        key = frozenset(out)
        cut = self._cuts.get(key)
        if cut is None:
            if len(self._cuts) >= MAX_CUTS:
                self._cuts.clear()
            cut = self._cuts[key] = self._cut_without(key)
        return cut

    def _cut_without(self, out: frozenset[int]) -> Pool:
        assert self._values is not None and self._topology is not None
        kept = [m for i, m in enumerate(self.members[: self.num_candidates]) if i not in out]
        others = [m for i, m in enumerate(self.members) if i in out or i >= self.num_candidates]
        return _cut(kept, others, self._values, self._topology)

    def check_equal(self, other: Pool) -> None:
        """Raises AssertionError where a pool built anew would differ."""
        assert self.layout == other.layout
        assert [m.index for m in self.members] == [m.index for m in other.members]
        assert self.num_prefill == other.num_prefill
        assert self.num_candidates == other.num_candidates
        assert self.position == other.position
        assert np.array_equal(self.slots, other.slots)
        for mine, theirs in (
            (self.max_model_lens, other.max_model_lens),
            (self.fetch_block_s, other.fetch_block_s),
            (self.fetch_latency, other.fetch_latency),
            (self.pair_seconds, other.pair_seconds),
            (self.pair_latency, other.pair_latency),
            (self.loads(), other.loads()),
        ):
            assert np.array_equal(mine, theirs)


def build_pools(rows: Iterable[WorkerRow], values: Floats, topology: Topology) -> tuple[Pool, ...]:
    """Pools with at least one candidate, from the workers of one model."""
    groups: dict[KvLayout, list[WorkerRow]] = {}
    for row in rows:
        groups.setdefault(row.info.layout, []).append(row)
    pools = []
    for group in groups.values():
        candidates = [row for row in group if row.is_eligible]
        if candidates:
            only_read = [row for row in group if row.is_readable and not row.is_eligible]
            pools.append(_cut(candidates, only_read, values, topology))
    return tuple(pools)


def _cut(
    candidates: Sequence[WorkerRow],
    only_read: Sequence[WorkerRow],
    values: Floats,
    topology: Topology,
) -> Pool:
    prefill = [row for row in candidates if row.info.role is Role.PREFILL]
    decode = [row for row in candidates if row.info.role is not Role.PREFILL]
    members = (*prefill, *decode, *only_read)
    num_prefill, num_candidates = len(prefill), len(candidates)
    rows = np.array([row.index for row in members], np.intp)
    lens = np.array([row.info.max_model_len for row in members[:num_candidates]], np.float64)
    readers = rows[:num_candidates]
    layout = members[0].info.layout
    fetch_seconds, fetch_latency = topology.costs(readers, rows)
    pair_seconds, pair_latency = topology.costs(readers[num_prefill:], readers[:num_prefill])
    return Pool(
        layout=layout,
        token_bytes=layout.token_bytes,
        members=members,
        num_prefill=num_prefill,
        num_candidates=num_candidates,
        rows=rows,
        slots=np.array([row.slot for row in members], np.intp),
        max_slot=max(row.slot for row in members),
        position={row.info.worker_id: i for i, row in enumerate(members[:num_candidates])},
        max_model_lens=lens,
        max_num_seqs=np.array(
            [row.info.max_num_seqs for row in members[:num_candidates]], np.float64
        ),
        min_num_seqs=min(row.info.max_num_seqs for row in members[:num_candidates]),
        cost_places=np.array(COST_ROWS)[:, None] * values.shape[1] + readers,
        fetch_block_s=fetch_seconds * layout.block_bytes,
        fetch_latency=fetch_latency + topology.prices.fetch_s,
        pair_seconds=pair_seconds,
        pair_latency=pair_latency + topology.prices.handoff_s,
        min_model_len=float(lens.min()),
        speed_book=SpeedBook(
            [row.info.worker_id for row in members[:num_candidates]], num_prefill, layout.block_size
        ),
        _values=values,
        _topology=topology,
    )
