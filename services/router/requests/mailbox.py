"""What arrives for one placement of one request: many sessions write, one request reads.

Writing never waits, so a slow client cannot hold up the others on the same session. The number of
entries is bounded by merging: beyond the limit, tokens are appended to the entry before them, and
a sequence has only so many tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from baton.core.request import TokenDelta
from baton.core.worker_info import WorkerId
from services.router.requests.pacing import Pacer


class Arrival(NamedTuple):
    """A worker's delta, or (`lost` set) the news that it will not send any more."""

    worker_id: WorkerId | None
    """None: news from the router itself."""
    at_s: float
    """Wall-clock time of arrival."""
    delta: TokenDelta | None = None
    lost: str = ""
    """Why the worker is given up."""


class Recipient(Protocol):
    """Where a session puts what it hears of one request."""

    def put(self, arrival: Arrival, now_s: float) -> None: ...


class Mailbox:
    """Single reader. Everything runs on one event loop."""

    __slots__ = (
        "_has_output", "_items", "_limit", "_pacer", "_unread_since_s", "_waiter", "last_put_at_s",
    )  # fmt: skip

    def __init__(self, limit: int, *, now_s: float, pacer: Pacer | None = None) -> None:
        """`pacer`: decides when the reader of tokens goes on; without one, always at once."""
        self._limit = limit
        self._pacer = pacer
        self._has_output = False
        self._items: list[Arrival] = []
        self._waiter: asyncio.Future[None] | None = None
        self.last_put_at_s = now_s
        """Event-loop time of the last sign of life."""
        self._unread_since_s = now_s

    @property
    def unread(self) -> Sequence[Arrival]:
        """What the reader has yet to take, oldest first."""
        return self._items

    def unread_for_s(self, now_s: float) -> float:
        """How long the reader has left the oldest unread entry; 0 when there is none."""
        return now_s - self._unread_since_s if self._items else 0.0

    def put(self, arrival: Arrival, now_s: float) -> None:
        """Add `arrival` and wake the reader. `now_s` is event-loop time."""
        self.last_put_at_s = now_s
        if not self._items:
            self._unread_since_s = now_s
        if len(self._items) < self._limit or not self._merge(arrival):
            self._items.append(arrival)
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        delta = arrival.delta
        is_more = self._has_output and delta is not None and delta.finish_reason is None
        if is_more and self._pacer is not None:
            self._pacer.wake(waiter)
        else:
            self._has_output = delta is not None
            waiter.set_result(None)

    async def take(self) -> list[Arrival]:
        """All that has arrived, oldest first; waits until there is something."""
        if not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        items, self._items = self._items, []
        return items

    def _merge(self, arrival: Arrival) -> bool:
        last, new = self._items[-1].delta, arrival.delta
        if last is None or new is None or self._items[-1].worker_id != arrival.worker_id:
            return False
        if last.finish_reason or last.first_index + len(last.token_ids) != new.first_index:
            return False
        last.token_ids += new.token_ids
        last.logprobs += new.logprobs
        last.finish_reason = new.finish_reason
        last.stop_token_id = new.stop_token_id
        last.error, last.is_retryable = new.error, new.is_retryable
        last.is_overload = new.is_overload
        last.timeline = new.timeline or last.timeline
        return True
