"""Series and log lines of the shared state, behind one object that any of its parts may call."""

from __future__ import annotations

import logging

from baton.core.logging import log_fields
from baton.core.metrics import (
    QUOTA_ANSWERS,
    ROUTER_COPIES,
    SHARED_GARBAGE,
    SHARED_NOTES,
    SHARED_UP,
)
from baton.telemetry.metrics import Metrics
from services.router.shared.state import SharedBackend

logger = logging.getLogger(__name__)

MAX_REASONS = 64


class SharedTelemetry:
    """Says each thing once, and counts it every time."""

    def __init__(self, metrics: Metrics, backend: SharedBackend) -> None:
        self._metrics = metrics
        self._backend = backend.value
        self._garbage_logged: set[tuple[str, str]] = set()
        self.set_up(True)
        self.set_copies(1)

    def set_up(self, is_up: bool) -> None:
        self._metrics.set(SHARED_UP, 1.0 if is_up else 0.0, self._backend)

    def set_copies(self, num_copies: int) -> None:
        self._metrics.set(ROUTER_COPIES, num_copies)

    def went_away(self, reason: str) -> None:
        self.set_up(False)
        logger.warning(
            "shared state (%s) is away, quotas are estimated and keys come from the last view: %s",
            self._backend,
            reason,
        )

    def came_back(self, away_s: float) -> None:
        self.set_up(True)
        log_fields(
            logger, "shared state answers", backend=self._backend, away_seconds=round(away_s, 1)
        )

    def garbage(self, kind: str, reason: str) -> None:
        """A value in the store was refused."""
        self._metrics.add(SHARED_GARBAGE, 1, kind)
        if len(self._garbage_logged) >= MAX_REASONS or (kind, reason) in self._garbage_logged:
            return
        self._garbage_logged.add((kind, reason))
        logger.warning("refused a value in shared state (%s): %s", kind, reason)

    def answered(self, *, is_granted: bool, is_estimated: bool) -> None:
        source = "estimated" if is_estimated else "exact"
        self._metrics.add(QUOTA_ANSWERS, 1, "granted" if is_granted else "refused", source)

    def notes(self, direction: str, count: int) -> None:
        if count:
            self._metrics.add(SHARED_NOTES, count, direction)
