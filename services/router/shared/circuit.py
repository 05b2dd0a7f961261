"""When to ask the store and when not to: a dead store must cost requests nothing.

    CLOSED ── MAX_TIMEOUTS in a row, or one refused connection ──► OPEN
      ▲                                                             │ probes by the keeper alone,
      └──────────────────── a probe succeeds ◄──────────────────────┘ ever further apart

Pure: time is passed in.
"""

from __future__ import annotations

MAX_TIMEOUTS = 3
"""A single late answer may be our own event loop's fault."""
PROBE_MIN_S = 0.1
PROBE_MAX_S = 2.0


class StoreCircuit:
    """Starts open: nobody has reached the store yet."""

    def __init__(self, now_s: float) -> None:
        self.is_closed = False
        self.since_s = now_s
        """When it last opened or closed."""
        self.reason = "not reached yet"
        self._num_timeouts = 0
        self._probe_pause_s = PROBE_MIN_S

    def succeeded(self) -> None:
        """A call of the request path was answered."""
        self._num_timeouts = 0

    def close(self, now_s: float) -> None:
        """A probe was answered and all is told to the store."""
        if not self.is_closed:
            self.is_closed = True
            self.since_s = now_s
        self.reason = ""
        self._num_timeouts = 0
        self._probe_pause_s = PROBE_MIN_S

    def timed_out(self, reason: str, now_s: float) -> bool:
        """Whether the circuit opened by this."""
        self._num_timeouts += 1
        return self._num_timeouts >= MAX_TIMEOUTS and self.failed(reason, now_s)

    def failed(self, reason: str, now_s: float) -> bool:
        """Whether the circuit opened by this."""
        self.reason = reason
        if not self.is_closed:
            return False
        self.is_closed = False
        self.since_s = now_s
        return True

    def next_probe_pause_s(self) -> float:
        """Doubles from call to call while open."""
        pause_s = self._probe_pause_s
        self._probe_pause_s = min(PROBE_MAX_S, 2 * pause_s)
        return pause_s
