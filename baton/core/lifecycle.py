"""The life of a request as time points, recorded where they happen.

    router   ARRIVED ─ PLACED ──────────────────────── FIRST_TOKEN ──────────── LAST_TOKEN
    prefill         PREFILL_QUEUED ─ PREFILL_STARTED ─ PREFILL_ENDED
    decode          DECODE_RESERVED ─ TRANSFER_STARTED ─ TRANSFER_ENDED ─ DECODE_STARTED ─ _ENDED

Times are wall-clock seconds, so points of several hosts can be laid beside each other; durations
are only ever taken between two points of the same process. Every histogram and the log line of a
request are computed from these points and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class LifecycleEvent(IntEnum):
    """A point in a request's life. The numbers are the wire values; never renumber."""

    ARRIVED = 1
    PLACED = 2
    FIRST_TOKEN = 3
    LAST_TOKEN = 4
    PREFILL_QUEUED = 10
    PREFILL_STARTED = 11
    PREFILL_ENDED = 12
    DECODE_RESERVED = 20
    TRANSFER_STARTED = 21
    TRANSFER_ENDED = 22
    DECODE_STARTED = 23
    DECODE_ENDED = 24


@dataclass(slots=True)
class TransferStats:
    """What moving one request's KV cost, measured by the reader."""

    num_bytes: int = 0
    num_blocks: int = 0
    num_reads: int = 0
    seconds: float = 0.0
    """Time during which at least one read of this request was in flight."""
    exposed_seconds: float = 0.0
    """Part of it after the prefill worker had finished: what the transfer added to the latency."""

    @property
    def hidden_share(self) -> float | None:
        """Part of the transfer during which the prefill worker still computed, 0 to 1; None when
        nothing was read."""
        if not self.num_reads or self.seconds <= 0:
            return None
        return min(1.0, max(0.0, 1.0 - self.exposed_seconds / self.seconds))


@dataclass(slots=True)
class EngineUse:
    """A request's part of the engine steps it took part in, on one worker."""

    seconds: float = 0.0
    """Of each step's time the share that its tokens are of the step's, times the worker's ranks:
    GPU-seconds where these are GPUs."""
    num_steps: int = 0


@dataclass(slots=True)
class Timeline:
    """The recorded points of one request in one process."""

    points: dict[LifecycleEvent, float] = field(default_factory=dict)
    transfer: TransferStats = field(default_factory=TransferStats)
    engine: EngineUse = field(default_factory=EngineUse)
    """Of this process alone: `merge` leaves it as it is."""

    def record(self, event: LifecycleEvent, at_s: float) -> None:
        """Keep the first time an event happens; a preempted sequence starts only once."""
        self.points.setdefault(event, at_s)

    def merge(self, other: Timeline) -> None:
        """Take over the points of another process for the same request."""
        for event, at_s in other.points.items():
            self.points.setdefault(event, at_s)
        if other.transfer.num_reads:
            self.transfer = other.transfer

    def seconds(self, start: LifecycleEvent, end: LifecycleEvent) -> float | None:
        """Duration between two points, or None while one of them is missing."""
        if start not in self.points or end not in self.points:
            return None
        return max(0.0, self.points[end] - self.points[start])
