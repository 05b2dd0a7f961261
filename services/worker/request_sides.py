"""What the requests of a worker need of its other parts, one seam per part.

All calls are made on the event loop and return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from baton.core.block import BlockHash
from baton.core.lifecycle import Timeline
from baton.core.request import GenerateRequest, RequestId
from baton.core.worker_info import LoadReport
from baton.engine.engine import ChunkDone, Reservation


class LeaseSide(Protocol):
    """The owner of blocks that others read, as seen from here."""

    def announce(self, chunk: ChunkDone) -> None:
        """Blocks of a PREFILL request, or of one being taken over, are complete and leased."""
        ...

    def withdraw(self, request_id: RequestId, reason: str) -> None:
        """No more chunks will come; unknown ids are ignored."""
        ...

    def handover_over(self, request_id: RequestId) -> None:
        """The engine has ended a handover by itself."""
        ...


class ReadSide(Protocol):
    """The reader of others' blocks, as seen from here."""

    def expect(self, request: GenerateRequest) -> None:
        """A request that reads all its KV has arrived; its reservation follows, or `drop`."""
        ...

    def reserved(self, reservation: Reservation) -> None:
        """The engine holds blocks to read into."""
        ...

    def drop(self, request_id: RequestId) -> None:
        """Stop; a reservation ends in `not_arrived` before this returns. Unknown: ignored."""
        ...


class HoldSide(Protocol):
    """Who lets requests wait for a part of their prompt's KV, as seen from here."""

    @property
    def num_held(self) -> int: ...
    @property
    def num_held_tokens(self) -> int: ...

    def hold(self, request: GenerateRequest) -> bool:
        """False: it need not wait. True: `released` follows, or `drop`."""
        ...

    def drop(self, request_id: RequestId) -> None: ...

    def computed(self, num_tokens: int, timeline: Timeline) -> None:
        """A request has ended that had `num_tokens` of its prompt computed here, if any."""
        ...

    def cache_changed(self, stored: Sequence[BlockHash], removed: Sequence[BlockHash]) -> None:
        """The engine's news of its prefix cache, in order."""
        ...


class SaveSide(Protocol):
    """Who saves blocks before they are evicted, as seen from here."""

    def on_load(self, load: LoadReport) -> None: ...
