"""When those who wait for tokens are woken: at once, or together a little later.

    tokens arrive ── readers woken, frames written ──┐ busy for b seconds
                                                     └── the next wait for up to 2 b ──► together

Waking a reader and writing to its connection costs more than all else that a token takes here. As
long as the tokens of a step are written within `MIN_BUSY_S` nothing is ever held. A loop that takes
longer is falling behind: then the tokens of a request gather while others are written, and leave in
one write. So writing takes a third of a busy loop's time, and a token waits no longer than it would
in the queues of a loop that writes each alone.

Does not know: what is waited for. First tokens, ends and bad news are not brought here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

MIN_BUSY_S = 0.002
"""About a hundred tokens. Below the time between steps of any model, so that holding would only
delay."""
HOLD_FACTOR = 2.0
MAX_HOLD_S = 0.02
"""Less than a reader of text notices."""


class Pacer:
    """One per event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._held: dict[asyncio.Future[None], None] = {}
        self._open_at_s = 0.0
        self._woken_at_s: float | None = None
        """When the readers were woken whose writing is being timed."""
        self._busy_s = 0.0

    @property
    def num_held(self) -> int:
        return len(self._held)

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Set the result of `waiter` now or, while the loop is behind, within MAX_HOLD_S."""
        if self._woken_at_s is None:
            now_s = self._clock()
            if now_s < self._open_at_s:
                if not self._held:
                    loop = asyncio.get_running_loop()
                    loop.call_later(self._open_at_s - now_s, self._release)
                self._held[waiter] = None
                return
            self._time_writing(now_s)
        waiter.set_result(None)

    def _release(self) -> None:
        held, self._held = self._held, {}
        if self._woken_at_s is None:
            self._time_writing(self._clock())
        for waiter in held:
            if not waiter.done():
                waiter.set_result(None)

    def _time_writing(self, now_s: float) -> None:
        self._woken_at_s = now_s
        loop = asyncio.get_running_loop()
        # Readers woken in this turn of the loop run in the next one, before the second callback.
        loop.call_soon(loop.call_soon, self._written)

    def _written(self) -> None:
        assert self._woken_at_s is not None
        now_s = self._clock()
        busy_s, before_s = now_s - self._woken_at_s, self._busy_s
        self._woken_at_s, self._busy_s = None, busy_s
        # Twice in a row: one long call in between is no reason.
        if min(busy_s, before_s) > MIN_BUSY_S:
            self._open_at_s = now_s + min(HOLD_FACTOR * min(busy_s, before_s), MAX_HOLD_S)
