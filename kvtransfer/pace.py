"""How long a mover sleeps between two looks at the pieces it has in flight. Pure.

By the rate of the pieces before, the oldest one is due at a certain time: until shortly before, its
mover sleeps, then it looks without a pause, for a moment. A piece that is late, or the first one,
is looked for after sleeps that grow with its age.
"""

from __future__ import annotations

POLL_SHARE = 0.05
"""Between two looks, of the time that the youngest piece has been in flight: what has ended is seen
late by about that share, and a short piece soon."""
MAX_POLL_S = 0.0001
DUE_LEAD_S = 0.0001
"""Before a piece is due: a sleep may end late by about this."""
MAX_DUE_POLL_S = 0.001
"""However far away that is: a link that has stood still may be fast again."""
MAX_SPIN_S = 0.0002
"""Past the time a piece is due; so much of a core a piece costs at most, with the lead."""
RATED_PIECE_BYTES = 4 << 20
"""Smaller pieces say more of a link's latency than of its rate."""


class Pace:
    """Pieces are taken to be moved one behind the other, in the order they were posted."""

    def __init__(self, min_poll_s: float) -> None:
        self._min_poll_s = min_poll_s
        self._bytes_per_second = 0.0
        """Of late pieces; 0 while none was large enough to tell."""
        self._landed_at_s = 0.0

    def landed(self, num_bytes: int, posted_at_s: float, now_s: float) -> None:
        """A piece has ended well."""
        seconds = now_s - max(posted_at_s, self._landed_at_s)
        self._landed_at_s = now_s
        if num_bytes >= RATED_PIECE_BYTES and seconds > 0:
            rate, known = num_bytes / seconds, self._bytes_per_second
            self._bytes_per_second = (known + rate) / 2 if known else rate

    def pause_s(
        self, num_bytes: int, posted_at_s: float, youngest_at_s: float, now_s: float
    ) -> float:
        """Until the next look; 0: at once. The first two are of the oldest piece."""
        if self._bytes_per_second:
            begun_s = max(posted_at_s, self._landed_at_s)
            due_s = begun_s + num_bytes / self._bytes_per_second
            left_s = due_s - DUE_LEAD_S - now_s
            if left_s > 0:
                # It may be early: long waits are taken in halves.
                return min(MAX_DUE_POLL_S, max(left_s / 2, min(left_s, MAX_SPIN_S)))
            if now_s < due_s + MAX_SPIN_S:
                return 0.0
        age_s = now_s - youngest_at_s
        return min(MAX_POLL_S, max(self._min_poll_s, POLL_SHARE * age_s))
