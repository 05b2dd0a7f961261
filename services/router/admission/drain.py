"""How fast a queue drains, and what those who were sent away have been told. Plain state machines.

Does not know: what the work is; time is passed in.
"""

from __future__ import annotations

import math
from collections import deque

WINDOW_S = 5.0
"""Time with a queue over which the rate is averaged; it forgets by a factor of e in this time."""
TRUST_S = 1.0
"""Time with a queue after which the measured rate counts alone."""
LINGER_S = 0.5
MAX_PROMISES = 4096


class DrainMeter:
    """Work let go to the workers per second of time in which they had all they could do.

    That is while requests wait, and for a moment after the last one waited or was sent away: a
    queue that is empty only now and then belongs to workers that are busy all the time. Other time
    says nothing about what could have been done.
    """

    def __init__(self) -> None:
        self._is_backlogged = False
        self._saturated_until_s = -math.inf
        self._since_s = 0.0
        self._busy_s = 0.0
        self._tokens = 0.0
        self._assumed_rate: float | None = None

    def assume(self, tokens_per_s: float) -> None:
        """What to go by until something has been measured."""
        self._assumed_rate = tokens_per_s

    def set_backlogged(self, is_backlogged: bool, now_s: float) -> None:
        """Whether requests wait."""
        self._accrue(now_s)
        if self._is_backlogged or is_backlogged:
            self._saturated_until_s = now_s + LINGER_S
        self._is_backlogged = is_backlogged

    def stop(self, now_s: float) -> None:
        """Something else holds requests up from now on."""
        self._accrue(now_s)
        self._is_backlogged, self._saturated_until_s = False, -math.inf

    def refused(self, now_s: float) -> None:
        """A request was sent away."""
        self._accrue(now_s)
        self._saturated_until_s = now_s + LINGER_S

    def taken(self, tokens: float, now_s: float) -> None:
        """Work has gone to a worker."""
        self._accrue(now_s)
        if self._is_backlogged or now_s < self._saturated_until_s:
            self._tokens += tokens

    def tokens_per_s(self, now_s: float) -> float | None:
        """None while nothing is known."""
        self._accrue(now_s)
        doubt = max(0.0, 1.0 - self._busy_s / TRUST_S)
        if doubt and self._assumed_rate is None:
            return None
        assumed = doubt * (self._assumed_rate or 0.0)
        # The assumed rate stands in for the time that is missing to TRUST_S.
        return (self._tokens + assumed * TRUST_S) / max(self._busy_s, TRUST_S)

    def _accrue(self, now_s: float) -> None:
        until_s = now_s if self._is_backlogged else min(now_s, self._saturated_until_s)
        elapsed_s = max(0.0, until_s - self._since_s)
        self._since_s = max(self._since_s, now_s)
        if elapsed_s:
            keep = math.exp(-elapsed_s / WINDOW_S)
            self._tokens *= keep
            self._busy_s = self._busy_s * keep + elapsed_s


class RetryLedger:
    """Work that was sent away and may come back.

    Clients who are turned away together must not be told to come back together. Each is told a
    time by which the work of those before it can have been done too.
    """

    def __init__(self) -> None:
        self._promises: deque[tuple[float, float]] = deque(maxlen=MAX_PROMISES)
        """(due, tokens), in the order of their making."""
        self._tokens = 0.0

    def outstanding_tokens(self, now_s: float) -> float:
        """Work that is yet to come back; what is due has come, or never will."""
        promises = self._promises
        while promises and promises[0][0] <= now_s:
            self._tokens -= promises.popleft()[1]
        if not promises:
            self._tokens = 0.0
        return max(0.0, self._tokens)

    def promise(self, due_at_s: float, tokens: float) -> None:
        if len(self._promises) == MAX_PROMISES:
            self._tokens -= self._promises[0][1]
        self._promises.append((due_at_s, tokens))
        self._tokens += tokens
