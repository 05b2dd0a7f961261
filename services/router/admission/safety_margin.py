"""By how much predictions are too bold, learned from what came. A plain state machine.

The margin moves until a share of all outcomes lies below prediction plus margin: a step up
after an outcome above it, a step of (1 - share) / share of that down after one below. Steps are
shares of the target, so margins of seconds and of milliseconds settle after as many requests.

Does not know: what is predicted.
"""

from __future__ import annotations

SAFE_SHARE = 0.95
"""Unless another one is asked for."""
STEP = 0.02
"""Of the target."""
NEAR = 0.7
"""Of the target."""
MAX_MARGIN = 0.5
"""Of the target: with worse predictions half of the target is all that admission can use."""


class SafetyMargin:
    """Of one kind of prediction."""

    def __init__(self, safe_share: float = SAFE_SHARE) -> None:
        self.margin_s = 0.0
        self._safe_share = safe_share

    def of(self, target_s: float) -> float:
        """The part of it that a request with this target is held to."""
        return min(self.margin_s, MAX_MARGIN * target_s)

    def learn(
        self, predicted_s: float | None, actual_s: float | None, target_s: float | None
    ) -> None:
        """Nothing is learned where one of them is missing. What stays far below the target is safe,
        however bold its prediction was."""
        if predicted_s is None or actual_s is None or target_s is None:
            return
        margin_s = self.of(target_s)
        if actual_s <= max(predicted_s + margin_s, NEAR * target_s):
            self.margin_s = max(0.0, self.margin_s - STEP * target_s * (1 - self._safe_share))
        elif margin_s == self.margin_s:
            # A target too small for the margin says nothing about the margin of others.
            step_s = STEP * target_s * self._safe_share
            self.margin_s = min(MAX_MARGIN * target_s, self.margin_s + step_s)
