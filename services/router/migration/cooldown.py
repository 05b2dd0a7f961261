"""Who is left alone after a failure, and for how long: twice as long with each one in a row.

Pure: time is passed in.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K")


class _Rest(NamedTuple):
    until_s: float
    pause_s: float


class Cooldowns(Generic[K]):
    """By key; a key that has rested and not failed again for as long starts over."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._rests: dict[K, _Rest] = {}

    def __len__(self) -> int:
        return len(self._rests)

    def is_resting(self, key: K, now_s: float) -> bool:
        rest = self._rests.get(key)
        return rest is not None and now_s < rest.until_s

    def failed(self, key: K, now_s: float) -> None:
        rest = self._rests.get(key)
        if rest is not None and now_s < rest.until_s:
            # One of several attempts that ran at once; it tells nothing new.
            return
        pause_s = self._first_s if rest is None else min(2 * rest.pause_s, self._longest_s)
        self._rests[key] = _Rest(now_s + pause_s, pause_s)

    def succeeded(self, key: K) -> None:
        self._rests.pop(key, None)

    def forget_past(self, now_s: float) -> None:
        """Drop what no longer matters, so that memory stays bounded."""
        self._rests = {k: r for k, r in self._rests.items() if now_s < r.until_s + r.pause_s}
