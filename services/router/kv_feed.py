"""One worker's KV events on their way to the router's index: in order, none missing.

    Welcome (snapshot up to number n) ─► events n+1, n+2 ... ─► gap ─► new snapshot ─► go on

A gap empties what is known of the worker until a snapshot has been fetched beside the running
session; events that come meanwhile wait for it. Without a snapshot the session is given up.

Does not know: the index, the connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import grpc

from baton.core.block import BlockHash, split_hashes
from baton.rpc.v1 import worker_pb2 as pb

logger = logging.getLogger(__name__)


class KvListener(Protocol):
    """Called on the event loop; must not block."""

    def on_kv_event(self, removed: Sequence[BlockHash], stored: Sequence[BlockHash]) -> None:
        """What was removed must be applied first: a block may be evicted and stored again."""
        ...

    def on_snapshot(self, cached_hashes: Sequence[BlockHash]) -> None:
        """Replaces everything known of the worker's blocks; empty while a gap is repaired."""
        ...


class KvFeed:
    """Of one session, `start` to `stop`; may be started again."""

    def __init__(
        self,
        name: str,
        listener: KvListener,
        *,
        fetch_snapshot: Callable[[], Awaitable[pb.Welcome]],
        give_up: Callable[[str], None],
    ) -> None:
        """`name`: the worker's, for the log. `fetch_snapshot` has a deadline of its own."""
        self._name = name
        self._listener = listener
        self._fetch_snapshot = fetch_snapshot
        self._give_up = give_up
        self._sequence = 0
        self._repair: asyncio.Task[None] | None = None
        self._waiting: list[tuple[int, pb.KvEvent]] = []

    def start(self, sequence: int) -> None:
        """`sequence`: of the last event that the session's snapshot contains."""
        self.stop()
        self._sequence = sequence

    def stop(self) -> None:
        if self._repair is not None:
            self._repair.cancel()
            self._repair = None
        self._waiting.clear()

    def push(self, first_sequence: int, events: Sequence[pb.KvEvent]) -> None:
        """Events as the worker sent them, the first with its number."""
        if self._repair is not None:
            self._waiting += enumerate(events, start=first_sequence)
            return
        # A snapshot may already contain events that were on their way when it was taken.
        num_known = max(0, self._sequence + 1 - first_sequence)
        events, first_sequence = events[num_known:], first_sequence + num_known
        if not events:
            return
        if first_sequence != self._sequence + 1:
            logger.warning(
                "worker %s: KV event %d follows %d; asking for a snapshot",
                self._name, first_sequence, self._sequence,
            )  # fmt: skip
            self._listener.on_snapshot(())
            self._repair = asyncio.create_task(self._repair_gap(), name="KV event gap")
            return
        self._sequence += len(events)
        for event in events:
            self._listener.on_kv_event(split_hashes(event.removed), split_hashes(event.stored))

    async def _repair_gap(self) -> None:
        """Fetch a snapshot beside the running session, then apply what came meanwhile."""
        try:
            snapshot = await self._fetch_snapshot()
        except grpc.aio.AioRpcError as error:
            self._repair = None
            self._give_up(f"gap in KV events and no snapshot: {error.code().name}")
            return
        events, self._waiting = self._waiting, []
        self._repair = None
        self._sequence = snapshot.kv_sequence
        self._listener.on_snapshot(split_hashes(snapshot.cached_hashes))
        for sequence, event in events:
            self.push(sequence, [event])
