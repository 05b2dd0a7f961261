"""Several generations of one request, read as one and cancelled as one.

    generation 0 ──pump──►┐
    generation 1 ──pump──►├─ buffer ──take()──► whoever writes the response
    generation n ──pump──►┘

While the writer waits for a slow client, deltas gather in the buffer and leave together; when it
is full the pumps stop reading, and what the dispatcher then holds is bounded by max_tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import NamedTuple

from services.router.requests.generation import GenerationDelta

BUFFERED_DELTAS = 512
CLEANUP_TIMEOUT_S = 5.0


class Item(NamedTuple):
    """One delta of one choice."""

    choice: int
    delta: GenerationDelta


class DeltaFeed:
    """Starts reading at construction. One reader; `aclose` must be awaited at the end."""

    def __init__(self, generations: Sequence[AsyncIterator[GenerationDelta]]) -> None:
        self._buffer: list[Item] = []
        self._error: BaseException | None = None
        self._reader: asyncio.Future[None] | None = None
        self._has_room = asyncio.Event()
        self._has_room.set()
        loop = asyncio.get_running_loop()
        self._pumps = {loop.create_task(self._pump(i, g)) for i, g in enumerate(generations)}
        for pump in self._pumps:
            pump.add_done_callback(self._on_pump_done)

    async def take(self) -> list[Item]:
        """All deltas that are there, at least one; empty when every generation has ended.

        Raises what a generation raised, or the argument of `fail`.
        """
        while not self._buffer and self._error is None and self._pumps:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        items, self._buffer = self._buffer, []
        self._has_room.set()
        if not items and self._error is not None:
            raise self._error
        return items

    def fail(self, error: BaseException) -> None:
        """Cancel all generations at once; what is not taken yet is dropped, `take` raises."""
        self._error = self._error or error
        self._buffer.clear()
        self._cancel()
        self._wake()

    async def aclose(self) -> None:
        """Cancel what still runs and wait until every generation has cleaned up."""
        self._cancel()
        await self.drain(CLEANUP_TIMEOUT_S)

    async def drain(self, timeout_s: float) -> None:
        """Let generations whose last delta was taken come to their own end."""
        if self._pumps:
            await asyncio.wait(set(self._pumps), timeout=timeout_s)

    async def _pump(self, index: int, generation: AsyncIterator[GenerationDelta]) -> None:
        try:
            async for delta in generation:
                self._buffer.append(Item(index, delta))
                self._wake()
                if len(self._buffer) >= BUFFERED_DELTAS:
                    self._has_room.clear()
                    await self._has_room.wait()
        finally:
            # A pump cancelled between two deltas has not thrown anything into the generator yet.
            if isinstance(generation, AsyncGenerator):
                await generation.aclose()

    def _on_pump_done(self, pump: asyncio.Task[None]) -> None:
        self._pumps.discard(pump)
        if not pump.cancelled() and pump.exception() is not None:
            self._error = self._error or pump.exception()
            self._cancel()
        self._wake()

    def _cancel(self) -> None:
        for pump in self._pumps:
            pump.cancel()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
