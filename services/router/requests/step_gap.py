"""The time between a worker's decode steps as it is now, from the messages that carry their tokens.

A batch that grows shows here within a few steps, long before a request of it has ended. Gap and
batch are means over the same steps. Pure: time is passed in.
"""

from __future__ import annotations

from typing import NamedTuple

GAIN = 0.15
"""Of one step in the mean: the last ten or so count."""
MIN_STEPS = 4
MAX_GAP_S = 2.0
"""After a longer silence nothing was decoding meanwhile."""


class Decoding(NamedTuple):
    """What a worker decodes now, and how fast; means of its last steps."""

    gap_s: float
    num_sequences: float
    kv_tokens: float


class StepGap:
    """Of one worker."""

    __slots__ = ("_kv_tokens", "_last_at_s", "_mean_s", "_num_sequences", "_num_steps")

    def __init__(self) -> None:
        self._last_at_s = 0.0
        self._mean_s = self._num_sequences = self._kv_tokens = 0.0
        self._num_steps = 0

    def note(self, now_s: float, num_tokens: int, *, num_sequences: int, kv_tokens: int) -> None:
        """A message with `num_tokens` tokens for each of its sequences has arrived, from a worker
        that runs so many sequences with so much KV."""
        gap_s, self._last_at_s = now_s - self._last_at_s, now_s
        if not num_tokens:
            return
        if gap_s > MAX_GAP_S:
            self._num_steps = 0
            return
        self._num_steps += 1
        gain = max(GAIN, 1.0 / self._num_steps)
        self._mean_s += gain * (gap_s / num_tokens - self._mean_s)
        self._num_sequences += gain * (num_sequences - self._num_sequences)
        self._kv_tokens += gain * (kv_tokens - self._kv_tokens)

    def decoding(self, now_s: float) -> Decoding | None:
        """None while it does not decode, or has only begun to."""
        if self._num_steps < MIN_STEPS or now_s - self._last_at_s > MAX_GAP_S:
            return None
        return Decoding(self._mean_s, self._num_sequences, self._kv_tokens)
