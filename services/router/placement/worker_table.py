"""All workers as columns of numbers, kept up to date in place, so that a placement reads arrays
instead of asking every session.

    values[column, row]    load, written by each worker's `LoadBook` as news of it arrive
    topology               links between rows
    pools(model)           who may take work now: rows in order of role, cut out once and kept until
                           a worker comes, goes, drains, falls ill, or a link changes

A row is a worker's from `join` to `leave`; a lost worker keeps it.

Pure: no clock, no asyncio. Does not know: sessions, prompts, costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from baton.core.fabric import FabricReport, LinkReport
from baton.core.worker_info import WorkerId, WorkerInfo
from services.router.placement.candidates import Pool, WorkerRow, build_pools
from services.router.placement.load_book import Column, LoadBook
from services.router.placement.topology import LinkPrices, Topology, host_of

FIRST_CAPACITY = 32


class WorkerTable:
    """Rows of all workers this router knows."""

    def __init__(
        self,
        links: LinkPrices | None = None,
        *,
        on_load: Callable[[], None] | None = None,
    ) -> None:
        """`on_load`: called after every load report."""
        self._on_load = on_load
        self._values = np.zeros((len(Column), FIRST_CAPACITY))
        self.topology = Topology(links or LinkPrices(), capacity=FIRST_CAPACITY)
        self._rows: dict[WorkerId, WorkerRow] = {}
        self._free = list(reversed(range(FIRST_CAPACITY)))
        self._pools: dict[str, tuple[Pool, ...]] = {}
        self._built_at = 0
        """Version of the topology that the pools were cut out with."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._rows

    def rows(self) -> Iterable[WorkerRow]:
        return self._rows.values()

    def join(self, info: WorkerInfo, book: LoadBook, *, slot: int) -> None:
        """A worker has said who it is. `slot`: its column in a prefix match.

        The same id again is the same row: a new process, or a new session with the old one.
        """
        known = self._rows.get(info.worker_id)
        if known is not None:
            if known.info.epoch == info.epoch and known.info.address == info.address:
                known.book.detach()
                known.info, known.book, known.slot = info, book, slot
                known.is_lost = known.is_leaving = False
                self._attach(known)
                return
            self.leave(info.worker_id)
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.topology.join(row, host_of(info.address))
        self._rows[info.worker_id] = WorkerRow(info, book, row, slot)
        for other in self._rows.values():
            for link in other.links:
                if link.peer_id == info.worker_id:
                    self._take_link(other, link)
        self._attach(self._rows[info.worker_id])

    def set_info(self, info: WorkerInfo) -> None:
        """The process of the worker's row has another role; unknown workers are ignored."""
        row = self._rows.get(info.worker_id)
        if row is not None and row.info.epoch == info.epoch:
            row.info = info
            self._changed()

    def leave(self, worker_id: WorkerId) -> None:
        """Forget the worker; unknown ones are ignored."""
        row = self._rows.pop(worker_id, None)
        if row is None:
            return
        row.book.detach()
        self._values[:, row.index] = 0.0
        self.topology.leave(row.index)
        self._free.append(row.index)
        self._changed()

    def set_lost(self, worker_id: WorkerId) -> None:
        """It takes no work and nobody can read from it, until it joins again."""
        row = self._rows.get(worker_id)
        if row is not None and not row.is_lost:
            row.is_lost = True
            self._changed()

    def set_leaving(self, worker_id: WorkerId, is_leaving: bool) -> None:
        """It takes no work; what it caches can still be read."""
        row = self._rows.get(worker_id)
        if row is not None and row.is_leaving != is_leaving:
            row.is_leaving = is_leaving
            self._changed()

    def report_links(self, worker_id: WorkerId, report: FabricReport) -> None:
        """What the worker says of its links; those to unknown peers count when they join."""
        reader = self._rows.get(worker_id)
        if reader is None:
            return
        reader.links = report.links
        for link in report.links:
            self._take_link(reader, link)

    def get(self, worker_id: WorkerId) -> WorkerRow | None:
        return self._rows.get(worker_id)

    def pools(self, model: str) -> tuple[Pool, ...]:
        """Workers that may take new work for `model`, by KV layout; empty when there are none."""
        if self._built_at != self.topology.version:
            self._changed()
        pools = self._pools.get(model)
        if pools is None:
            rows = [row for row in self._rows.values() if row.info.model_name == model]
            pools = build_pools(rows, self._values, self.topology)
            if rows:
                # Names that clients invent must not fill the memory.
                self._pools[model] = pools
        return pools

    def check_integrity(self) -> None:
        """Raises AssertionError when what is kept differs from what it would be if built anew."""
        used = [row.index for row in self._rows.values()]
        assert len(set(used)) == len(used), "a row belongs to two workers"
        assert sorted([*used, *self._free]) == list(range(self._values.shape[1]))
        for row in self._rows.values():
            row.book.check_integrity()
            assert tuple(self._values[:, row.index]) == row.book.figures()
        assert not self._values[:, self._free].any(), "a free row holds load"
        for model in list(self._pools):
            kept = self.pools(model)
            rows = [row for row in self._rows.values() if row.info.model_name == model]
            built = build_pools(rows, self._values, self.topology)
            assert len(kept) == len(built)
            for one, other in zip(kept, built, strict=True):
                one.check_equal(other)

    def _take_link(self, reader: WorkerRow, link: LinkReport) -> None:
        source = self._rows.get(link.peer_id)
        if source is not None and source.info.epoch == link.peer_epoch:
            self.topology.report(reader.index, source.index, link)

    def _attach(self, row: WorkerRow) -> None:
        row.book.attach(
            self._values[:, row.index],
            block_size=row.info.layout.block_size,
            on_flags=self._changed,
            on_report=self._on_load,
        )
        self._changed()

    def _grow(self) -> None:
        old = self._values.shape[1]
        values = np.zeros((len(Column), 2 * old))
        values[:, :old] = self._values
        self._values = values
        self.topology.grow(2 * old)
        self._free = list(reversed(range(old, 2 * old)))
        for row in self._rows.values():
            self._attach(row)

    def _changed(self) -> None:
        self._pools.clear()
        self._built_at = self.topology.version
