"""How fast this worker computes prompts and restores blocks, as its requests have seen it. Pure."""

from __future__ import annotations

from baton.core.lifecycle import LifecycleEvent, Timeline

MEMORY = 0.8
"""Weight that a sample keeps when the next one of the same size is counted."""
MIN_PROMPT_TOKENS = 32
"""Shorter prompts tell more of a step's fixed cost than of its rate."""


class MeanRate:
    """Amount over seconds, a mean that forgets."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    @property
    def seconds_each(self) -> float | None:
        """None before anything was measured."""
        return self._seconds / self._amount if self._amount else None

    @property
    def per_second(self) -> float | None:
        """None before anything was measured."""
        return self._amount / self._seconds if self._seconds else None

    def count(self, amount: float, seconds: float) -> None:
        """`amount` took `seconds`; nothing that took no time is counted."""
        if amount > 0 and seconds > 0:
            self._amount = self._amount * MEMORY + amount
            self._seconds = self._seconds * MEMORY + seconds


class PrefillRate:
    """Prompt tokens, from the time lines of finished prompts.

    Waiting for other sequences of the same steps counts: that is what a request is spared whose KV
    comes from elsewhere.
    """

    def __init__(self) -> None:
        self._rate = MeanRate()

    @property
    def seconds_per_token(self) -> float | None:
        """None before anything was measured."""
        return self._rate.seconds_each

    def count(self, num_tokens: int, timeline: Timeline) -> None:
        """`num_tokens` of a prompt were computed between two points of its time line."""
        seconds = timeline.seconds(LifecycleEvent.PREFILL_STARTED, LifecycleEvent.PREFILL_ENDED)
        if num_tokens >= MIN_PROMPT_TOKENS and seconds is not None:
            self._rate.count(num_tokens, seconds)
