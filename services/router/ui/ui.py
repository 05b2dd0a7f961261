"""What the page shows, read from the router where it stands.

Does not know: HTTP, who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Protocol

import baton
from services.router.pool_stats import PoolStats
from services.router.requests.request_record import RequestRecord
from services.router.ui.history import History
from services.router.ui.request_book import RequestBook
from services.router.ui.topology import topology
from services.router.ui.ui_config import UiConfig
from services.router.ui.waterfall import Waterfall, brief, waterfall
from services.router.workers.cluster_view import ClusterView

MAX_LISTED = 60

Sees = Callable[[RequestRecord], bool]
"""Whether the reader may know of a request."""


class Shown(Protocol):
    """The router, as far as the page looks at it."""

    def view(self) -> ClusterView: ...
    def pool_stats(self) -> PoolStats: ...
    def running(self) -> Collection[RequestRecord]:
        """Oldest first."""
        ...


class Ui:
    """One per router, on its event loop."""

    def __init__(
        self, config: UiConfig, router: Shown, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self.book = RequestBook(config.max_requests)
        self._history = History(config.history_s)
        self._router = router
        self._wall_clock = wall_clock

    def look(self) -> None:
        """To be called once a second."""
        now_s = self._wall_clock()
        if self._history.is_due(now_s):
            self._history.look(self._router.pool_stats(), self.book.take_ended(), now_s)

    def state(self, since: int, sees: Sees) -> dict[str, object]:
        """As JSON; `since`: number of the last sample that the reader has."""
        now_s = self._wall_clock()
        stats = self._router.pool_stats()
        listed = islice(((r, live) for r, live in self._newest() if sees(r)), MAX_LISTED)
        return {
            "version": baton.__version__,
            "now_s": now_s,
            "topology": topology(self._router.view(), self.book.edges()),
            "requests": [brief(r, is_running=live, now_s=now_s) for r, live in listed],
            "samples": self._history.since(since),
            "targets": {"ttft_s": stats.ttft_target_s, "itl_s": stats.itl_target_s},
            "num_running": stats.num_running,
            "num_queued": stats.num_queued,
            "num_arrived": stats.num_arrived,
            "num_refused": stats.num_refused,
        }

    def waterfall(self, request_id: str, sees: Sees) -> Waterfall | None:
        """None for a request that is not known, or not to this reader."""
        record, is_running = self.book.find(request_id), False
        if record is None:
            live = (r for r in self._router.running() if r.request_id == request_id)
            record, is_running = next(live, None), True
        if record is None or not sees(record):
            return None
        return waterfall(record, is_running=is_running, now_s=self._wall_clock())

    def _newest(self) -> Iterator[tuple[RequestRecord, bool]]:
        """Those that run first, each with whether it runs."""
        for record in reversed(tuple(self._router.running())):
            yield record, True
        for record in self.book.newest():
            yield record, False
