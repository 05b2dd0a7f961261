"""A span as a plain value, and the queue on its way to a collector.

The queue has a thread of its own, since exporters block; adding to it never does. It is bounded:
what does not fit is dropped and counted.

Does not know: what spans are about, how they are sent (`otlp`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

logger = logging.getLogger(__name__)

BATCH_SPANS = 512
GATHER_S = 0.5
"""Spans of so long go together."""

AttributeValue = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Times are wall-clock seconds."""

    name: str
    trace_id: int
    span_id: int
    parent_id: int
    """0: none."""
    start_s: float
    end_s: float
    service: str
    """Name of the program that did the work."""
    instance: str
    """Which of its processes."""
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    error: str = ""
    """Why it failed; empty when it did not."""
    is_server: bool = False
    """It answers a client's call."""
    trace_state: str = ""


class SpanExporter(Protocol):
    def export(self, spans: Sequence[Span]) -> bool:
        """Send them, within a time of its own; False when the collector did not take them."""
        ...

    def close(self) -> None: ...


class SpanCounts(NamedTuple):
    """Since start."""

    exported: int = 0
    dropped: int = 0
    failed: int = 0


class SpanQueue:
    """`add` and `counts` from one thread, the exporter from another."""

    def __init__(self, exporter: SpanExporter, *, max_pending: int) -> None:
        self._exporter = exporter
        self._max_pending = max_pending
        self._pending: deque[Span] = deque()
        self._wake = threading.Event()
        self._is_stopping = False
        self._exported = self._dropped = self._failed = 0
        self._thread = threading.Thread(target=self._run, name="span export", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> SpanCounts:
        return SpanCounts(self._exported, self._dropped, self._failed)

    def add(self, spans: Sequence[Span]) -> None:
        if len(self._pending) + len(spans) > self._max_pending or self._is_stopping:
            self._dropped += len(spans)
            return
        self._pending.extend(spans)
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Send what is pending, as far as the time allows. Blocks."""
        self._is_stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._dropped += len(self._pending)
        self._exporter.close()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            if not self._is_stopping:
                time.sleep(GATHER_S)
            self._wake.clear()
            while self._pending:
                self._send([self._pending.popleft() for _ in range(self._batch_size())])
            if self._is_stopping:
                return

    def _batch_size(self) -> int:
        return min(BATCH_SPANS, len(self._pending))

    def _send(self, batch: Sequence[Span]) -> None:
        try:
            is_taken = self._exporter.export(batch)
        except Exception:
            logger.exception("%d spans could not be sent", len(batch))
            is_taken = False
        if is_taken:
            self._exported += len(batch)
        else:
            self._failed += len(batch)
