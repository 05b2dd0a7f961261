"""Text up to a marker. What may be the beginning of one is held back, and so is blank space: before
a call and behind it there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Opened(NamedTuple):
    """What came of some text."""

    shown: str
    marker: str | None
    """The one found, if any."""
    rest: str
    """What follows it."""


class TextGate:
    """Looks for one of `markers`."""

    def __init__(self, *markers: str) -> None:
        self._markers = markers
        self._held = ""

    def push(self, text: str) -> Opened:
        """The marker that begins first wins, and the longest of those that begin together."""
        held = self._held + text
        found = [(at, -len(m), m) for m in self._markers if (at := held.find(m)) >= 0]
        hold = _num_held(held, self._markers)
        if found:
            at, _, marker = min(found)
            if hold < len(held) - at:
                # Nothing that began earlier may still become a marker.
                self._held = ""
                return Opened(held[:at].rstrip(), marker, held[at + len(marker) :])
        cut = len(held[: len(held) - hold].rstrip())
        self._held = held[cut:]
        return Opened(held[:cut], None, "")

    def put_back(self, text: str) -> None:
        """`text` has turned out to be no call."""
        self._held += text

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _num_held(text: str, markers: Sequence[str]) -> int:
    """How much of the end of `text` may be the beginning of a marker."""
    longest = max(map(len, markers)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(len(m) > size and m.startswith(tail) for m in markers):
            return size
    return 0
