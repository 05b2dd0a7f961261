"""When to look at waiting requests again: a heap, whose outdated entries are skipped.

Does not know: what is looked at.
"""

from __future__ import annotations

import heapq

from services.router.admission.ticket import Ticket, TicketState

SPARE = 64
"""Outdated entries that are not worth clearing away."""


class Checks:
    """At most one for each ticket that waits: at its `check_at_s`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Ticket]] = []
        self._num_added = 0

    def __len__(self) -> int:
        """Outdated ones included."""
        return len(self._heap)

    def add(self, ticket: Ticket, at_s: float, *, num_waiting: int) -> None:
        """Instead of its last one."""
        ticket.check_at_s = at_s
        self._num_added += 1
        heapq.heappush(self._heap, (at_s, self._num_added, ticket))
        if len(self._heap) > 2 * num_waiting + SPARE:
            self._heap = [check for check in self._heap if _is_valid(check)]
            heapq.heapify(self._heap)

    def due(self, now_s: float) -> list[Ticket]:
        """Take out those whose time has come."""
        tickets = []
        while self._heap and self._heap[0][0] <= now_s:
            check = heapq.heappop(self._heap)
            if _is_valid(check):
                tickets.append(check[2])
        return tickets

    @property
    def next_at_s(self) -> float | None:
        """None while there is none."""
        while self._heap and not _is_valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None


def _is_valid(check: tuple[float, int, Ticket]) -> bool:
    at_s, _, ticket = check
    return ticket.state is TicketState.WAITING and at_s == ticket.check_at_s
