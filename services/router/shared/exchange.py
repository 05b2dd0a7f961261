"""Placements between the copies: what this one does goes out, what the others do comes in.

teller    what piles up while one message is on its way is the next message
listener  follows the others for as long as the router lives, over all failures of the store
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from services.router.shared.deadline import STORE_TIMEOUT_S, within
from services.router.shared.outbox import NoteQueue
from services.router.shared.state import PlacementListener, PlacementNote
from services.router.shared.store import Store
from services.router.shared.telemetry import SharedTelemetry
from services.router.shared.wire import decode_batch, encode_batch

logger = logging.getLogger(__name__)

LISTEN_RETRY_S = 0.5


class PlacementExchange:
    """Used on one event loop, from `start` to `stop`."""

    def __init__(
        self,
        store: Store,
        *,
        copy_id: str,
        telemetry: SharedTelemetry,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._store = store
        self._copy_id = copy_id
        self._telemetry = telemetry
        self._on_failure = on_failure
        self._queue = NoteQueue()
        self._has_notes = asyncio.Event()
        self._listener: PlacementListener | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._tell(), name="placements out"),
            asyncio.create_task(self._listen(), name="placements in"),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def listen(self, listener: PlacementListener) -> None:
        self._listener = listener

    def publish(self, note: PlacementNote) -> None:
        self._telemetry.notes("dropped", self._queue.add(note))
        self._has_notes.set()

    def drop_all(self) -> None:
        """The others cannot be told; by the time they can, it is old."""
        self._telemetry.notes("dropped", self._queue.clear())

    async def _tell(self) -> None:
        while True:
            await self._has_notes.wait()
            self._has_notes.clear()
            while notes := self._queue.next_batch():
                try:
                    async with within(STORE_TIMEOUT_S, "telling placements"):
                        await self._store.publish(encode_batch(self._copy_id, notes))
                except Exception as error:
                    self._telemetry.notes("dropped", len(notes))
                    self._on_failure(error)
                else:
                    self._telemetry.notes("sent", len(notes))

    async def _listen(self) -> None:
        while True:
            try:
                async for data in self._store.batches():
                    self._hear(data)
            except Exception as error:
                # Often the first to notice that the store is away.
                self._on_failure(error)
            await asyncio.sleep(LISTEN_RETRY_S)

    def _hear(self, data: bytes) -> None:
        try:
            batch = decode_batch(data)
        except ValueError as error:
            self._telemetry.garbage("placement", str(error))
            return
        if batch.sender == self._copy_id:
            return
        self._telemetry.notes("received", len(batch.notes))
        if self._listener is None:
            return
        for note in batch.notes:
            try:
                self._listener(note)
            except Exception:
                logger.exception("a placement of another router could not be taken")
