"""Places of sequences in what the device keeps from one step to the next.

A sequence holds its place while it is in every step; one that skips a step has all its tokens on
the host by then and starts anew. Every rank assigns alike from the same steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.errors import InternalError
from baton.core.request import RequestId


@dataclass(frozen=True, slots=True)
class Assignment:
    """The places of one step's sequences."""

    slots: list[int]
    entered: list[int]
    """Indices into the step of sequences that were not in the step before."""


class SlotTable:
    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._slot_of: dict[RequestId, int] = {}

    def assign(self, request_ids: Sequence[RequestId]) -> Assignment:
        """Places for the step's sequences, which are distinct; all others lose theirs."""
        present = set(request_ids)
        for request_id in [r for r in self._slot_of if r not in present]:
            heapq.heappush(self._free, self._slot_of.pop(request_id))
        slots: list[int] = []
        entered: list[int] = []
        for index, request_id in enumerate(request_ids):
            slot = self._slot_of.get(request_id)
            if slot is None:
                if not self._free:
                    raise InternalError(f"a step of {len(request_ids)} sequences has no place left")
                slot = self._slot_of[request_id] = heapq.heappop(self._free)
                entered.append(index)
            slots.append(slot)
        return Assignment(slots, entered)
