"""The generations of one request, read as one and cancelled as one.

    generation ───────────────take()──► whoever writes the response         SoloFeed

    generation 0 ──pump──►┐
    generation 1 ──pump──►├─ buffer ──take()──► whoever writes the response DeltaFeed
    generation n ──pump──►┘

A single generation, the common case, is read by the writer itself: a token passes one queue, the
dispatcher's, on its way. While the writer waits for a slow client, deltas gather there, or in the
buffer, and leave together; a full buffer stops the pumps, and the dispatcher gives up a request
whose client takes nothing for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from services.router.requests.generation import GenerationDelta

Generation = AsyncIterator[Sequence[GenerationDelta]]
BUFFERED_DELTAS = 512
CLEANUP_TIMEOUT_S = 5.0


class Item(NamedTuple):
    """One delta of one choice."""

    choice: int
    delta: GenerationDelta


class Feed(Protocol):
    """What whoever writes the response needs. One reader; `aclose` must be awaited at the end."""

    async def take(self) -> list[Item]:
        """All deltas that are there, at least one; empty when every generation has ended.

        Raises what a generation raised, or the argument of `fail`.
        """
        ...

    def fail(self, error: BaseException) -> None:
        """Cancel all generations at once; what is not taken yet is dropped, `take` raises."""
        ...

    async def aclose(self) -> None:
        """Cancel what still runs and wait until every generation has cleaned up."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Let generations whose last delta was taken come to their own end."""
        ...


def open_feed(generations: Sequence[Generation]) -> Feed:
    return SoloFeed(generations[0]) if len(generations) == 1 else DeltaFeed(generations)


class SoloFeed:
    """Runs the generation in the reader's own task."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._error: BaseException | None = None
        self._reader: asyncio.Task[object] | None = None
        """The task that takes; always the same."""
        self._is_taking = False
        self._has_ended = False
        """By itself: there is nothing left to close."""
        self._closing: asyncio.Task[None] | None = None

    async def take(self) -> list[Item]:
        if self._error is not None:
            raise self._error
        if self._reader is None:
            self._reader = asyncio.current_task()
        self._is_taking = True
        try:
            return [Item(0, delta) for delta in await anext(self._generation)]
        except StopAsyncIteration:
            self._has_ended = True
            return []
        except asyncio.CancelledError:
            if self._error is None:
                raise
            # It was `fail` that cancelled, and only the generation.
            assert self._reader is not None
            self._reader.uncancel()
            raise self._error from None
        finally:
            self._is_taking = False

    def fail(self, error: BaseException) -> None:
        if self._error is not None:
            return
        self._error = error
        if self._is_taking and self._reader is not None:
            self._reader.cancel()
        else:
            # The writer is with its client; the workers are not to wait for it.
            self._closing = asyncio.get_running_loop().create_task(self._close())

    async def aclose(self) -> None:
        if self._has_ended:
            return
        closing = self._closing or asyncio.get_running_loop().create_task(self._close())
        await asyncio.wait({closing}, timeout=CLEANUP_TIMEOUT_S)
        # Its traceback leads back here.
        self._error = None

    async def drain(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                async for _ in self._generation:
                    pass
                self._has_ended = True

    async def _close(self) -> None:
        if isinstance(self._generation, AsyncGenerator):
            await self._generation.aclose()


class DeltaFeed:
    """Starts reading at construction."""

    def __init__(self, generations: Sequence[Generation]) -> None:
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
        self._error = self._error or error
        self._buffer.clear()
        self._cancel()
        self._wake()

    async def aclose(self) -> None:
        self._cancel()
        await self.drain(CLEANUP_TIMEOUT_S)
        # Its traceback leads back here.
        self._error = None

    async def drain(self, timeout_s: float) -> None:
        if self._pumps:
            await asyncio.wait(set(self._pumps), timeout=timeout_s)

    async def _pump(self, index: int, generation: Generation) -> None:
        try:
            async for deltas in generation:
                self._buffer.extend([Item(index, delta) for delta in deltas])
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
