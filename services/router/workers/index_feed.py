"""What sessions say of their workers' blocks, on its way into the prefix index.

The index applies changes many at a time; here is the timer that makes it, and the series and log
lines that say which workers' blocks are not known and why. All on one event loop.

Does not know: sessions, the numbers of events.
"""

from __future__ import annotations

import asyncio
import logging

from baton.core import metrics as series
from baton.core.tier import Tier
from baton.core.worker_info import WorkerId
from baton.telemetry.metrics import Metrics
from services.router.index.prefix_index import PrefixIndex
from services.router.workers.kv_feed import Held, KvChange, KvFault

logger = logging.getLogger(__name__)

FLUSH_S = 0.005
"""How long a change waits at most to be seen by matches, when no others push it on."""
FLUSH_HASHES = 4096
"""Applied per timer: some 2 ms of work, also while the snapshots of many workers come in."""


class IndexFeed:
    """One per router."""

    def __init__(self, index: PrefixIndex, metrics: Metrics | None = None) -> None:
        self._index = index
        self._metrics = metrics
        self._refused: dict[WorkerId, str] = {}
        """Workers whose blocks are not known, and why."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def refused(self) -> dict[WorkerId, str]:
        """Workers placed by load alone, with the reason."""
        return dict(self._refused)

    def ready(self, worker_id: WorkerId, held: Held, refusal: str) -> None:
        """A session has begun. `refusal`: why its events are not used."""
        self.replace(worker_id, held)
        if refusal:
            self.refuse(worker_id, refusal)
        elif self._refused.pop(worker_id, None) is not None and self._metrics is not None:
            self._metrics.remove(series.KV_UNMATCHED, str(worker_id))

    def replace(self, worker_id: WorkerId, held: Held) -> None:
        """All that is known of the worker's blocks from now on."""
        self._index.reset_worker(worker_id, held)
        self._flush_soon()

    def change(self, worker_id: WorkerId, change: KvChange) -> None:
        index = self._index
        if change.removed:
            index.remove(worker_id, change.removed)
        if change.on_disk:
            index.store(worker_id, change.on_disk, Tier.DISK)
        if change.on_host:
            index.store(worker_id, change.on_host, Tier.HOST)
        if change.stored:
            index.store(worker_id, change.stored)
        self._flush_soon()

    def refuse(self, worker_id: WorkerId, reason: str) -> None:
        if self._refused.get(worker_id) != reason:
            logger.warning("worker %s is placed by load alone: %s", worker_id, reason)
        self._refused[worker_id] = reason
        if self._metrics is not None:
            self._metrics.set(series.KV_UNMATCHED, 1, str(worker_id))

    def forget(self, worker_id: WorkerId) -> None:
        """The worker has left."""
        self._index.remove_worker(worker_id)
        if self._refused.pop(worker_id, None) is not None and self._metrics is not None:
            self._metrics.remove(series.KV_UNMATCHED, str(worker_id))
        self._flush_soon()

    def fault(self, fault: KvFault) -> None:
        if self._metrics is not None:
            self._metrics.add(series.KV_EVENT_FAULTS, 1, fault.value)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flush_soon(self) -> None:
        if self._timer is None and self._index.num_pending:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._index.flush(FLUSH_HASHES)
        if self._metrics is not None:
            self._metrics.set(series.INDEX_ENTRIES, len(self._index))
        self._flush_soon()
