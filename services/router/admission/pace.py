"""How fast requests leave the queue, and what that means to those who wait or are sent away.

Two things hold requests up, and work leaves at another rate under each:

    prompts   the prefill queues are long: work is measured in tokens, and prompts end evenly
    places    decode batches are as slow as they may be: one place for each sequence that ends,
              which is a matter of chance, so promises need the more reserve, the fewer places they
              are about

A plain state machine. Does not know: tenants, what a request looks like.
"""

from __future__ import annotations

from typing import NamedTuple

from services.router.admission.confidence import IN_DOUBT, SURE, events_allowed_for
from services.router.admission.drain import DrainMeter, RetryLedger

WAIT_RESERVE = 2.0
"""Times the mean of how long its turn behind prompts takes to come: whoever is let wait shall not
be sent away later."""
MIN_RETRY_AFTER_S = 0.1
FOREVER_S = 1e6


class Turn(NamedTuple):
    """What leaves the queue until a request has its turn, the request included."""

    tokens: float
    num_requests: float


class Pace:
    """Of one lane."""

    def __init__(self, *, max_retry_after_s: float) -> None:
        self._max_retry_after_s = max_retry_after_s
        self._meters = {is_for_places: DrainMeter() for is_for_places in (False, True)}
        self._is_for_places = False
        self._places_per_s = 0.0
        self._num_over = 1
        """Sequences that have to end before the next request can go."""
        self._num_decoding = 1
        self._ledger = RetryLedger()

    @property
    def is_for_places(self) -> bool:
        """Decode batches hold requests up."""
        return self._is_for_places

    # What is seen.

    def expect(
        self, *, prompts_per_s: float, places_per_s: float, num_decoding: int, cost_tokens: float
    ) -> None:
        """By what is predicted for a request of that cost: what the workers can do in a second."""
        self._places_per_s, self._num_decoding = places_per_s, num_decoding
        self._meters[False].assume(prompts_per_s * cost_tokens)
        if places_per_s > 0:
            # Else none of the sequences there are ours.
            self._meters[True].assume(places_per_s * cost_tokens)

    def held_up(self, num_over: int, now_s: float, *, has_backlog: bool) -> None:
        """A request has to wait: for so many sequences to end on its worker, or, where it is 0,
        behind prompts."""
        is_for_places = num_over > 0
        self._num_over = max(1, num_over)
        if is_for_places is not self._is_for_places:
            self._meter.stop(now_s)
            self._is_for_places = is_for_places
            self._meter.set_backlogged(has_backlog, now_s)

    def set_backlogged(self, has_backlog: bool, now_s: float) -> None:
        self._meter.set_backlogged(has_backlog, now_s)

    def taken(self, cost_tokens: float, now_s: float) -> None:
        self._meter.taken(cost_tokens, now_s)

    # What follows.

    def drain_s(self, tokens: float, now_s: float) -> float:
        """How long so much work takes to leave the queue; 0 while nothing is known."""
        rate = self._meter.tokens_per_s(now_s)
        if rate is None:
            return 0.0
        return tokens / rate if rate * FOREVER_S > tokens else FOREVER_S

    def surely_within_s(self, turn: Turn, now_s: float) -> float:
        """By when a request has its turn, as good as certainly."""
        if not self._is_for_places or not self._places_per_s:
            return WAIT_RESERVE * self.drain_s(turn.tokens, now_s)
        needed = events_allowed_for(self._num_places(turn), SURE)
        return _seconds(needed, self._places_per_s)

    def is_hopeless(self, turn: Turn, within_s: float, now_s: float) -> bool:
        """Whether its turn is not to be expected within that time."""
        num_places = self._num_places(turn)
        needed = events_allowed_for(num_places, IN_DOUBT)
        if self._is_for_places and self._places_per_s:
            return _seconds(needed, self._places_per_s) > within_s
        # Prompts leave in order of their work, whatever it is divided into.
        return self.drain_s(turn.tokens, now_s) * needed / num_places > within_s

    def retry_after_s(self, excess_s: float, cost_tokens: float, now_s: float) -> float:
        """For a request that is sent away now: when there will be room, if those sent away before
        come back first."""
        self._meter.refused(now_s)
        promised_s = self.drain_s(self._ledger.outstanding_tokens(now_s), now_s)
        retry_after_s = max(MIN_RETRY_AFTER_S, excess_s + promised_s)
        retry_after_s = min(retry_after_s, self._max_retry_after_s)
        self._ledger.promise(now_s + retry_after_s, cost_tokens)
        return retry_after_s

    @property
    def _meter(self) -> DrainMeter:
        return self._meters[self._is_for_places]

    def _num_places(self, turn: Turn) -> float:
        """The next one's may take several on its worker, of which this is one among others."""
        return turn.num_requests + self._num_decoding * (self._num_over - 1)


def _seconds(events: float, per_s: float) -> float:
    return events / per_s if per_s * FOREVER_S > events else FOREVER_S
