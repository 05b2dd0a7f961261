"""What one worker has to do, as numbers that placement reads: its last report, and what this router
(or another one that says so) has sent it since. Pure: time is passed in.

A report that is older than a submit cannot contain it, so what was just sent counts on top until a
later report has come. Every change goes straight into the worker's column of the table.

Does not know: other workers, sessions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

UNREPORTED_S = 0.05
"""A load report this much younger than a submit contains it: delivery and one engine step."""


class Column(IntEnum):
    """What is kept of each worker, in tokens but for the last two."""

    QUEUED = 0
    """Prompt tokens to be computed."""
    RESIDENT = 1
    """Tokens of KV held now or soon: running sequences, reservations, what is on its way. Counted
    from the pool where its size is known, since that includes reservations."""
    AVAILABLE = 2
    """Tokens a new sequence can get blocks for: free ones and those the cache would give up."""
    SEQUENCES = 3
    LEASES = 4


QUEUED, RESIDENT, AVAILABLE, SEQUENCES, LEASES = map(int, Column)
"""The same as plain numbers: arrays take them faster."""


class LoadFigures(Protocol):
    """A load report, whether from the wire or not."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def queued_prefill_tokens(self) -> int: ...
    @property
    def resident_kv_tokens(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def cached_blocks(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...
    @property
    def leases(self) -> int: ...
    @property
    def reservations(self) -> int: ...
    @property
    def is_draining(self) -> bool: ...
    @property
    def is_unhealthy(self) -> bool: ...


class _Sent(NamedTuple):
    at_s: float
    prefill_tokens: int
    kv_tokens: int


class LoadBook:
    """Of one worker; written by its session, read through the table."""

    __slots__ = (
        "_block_size", "_column", "_held_blocks", "_leases", "_on_flags", "_on_report", "_order",
        "_queued", "_resident", "_sent", "_sequences", "_usable_blocks", "is_draining",
        "is_unhealthy", "num_in_flight", "unreported_kv_tokens", "unreported_prefill_tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self._column: NDArray[np.float64] | None = None
        self._on_flags: Callable[[], None] | None = None
        self._on_report: Callable[[], None] | None = None
        self._block_size = 1
        self._sent: dict[str, _Sent] = {}
        self._order: deque[tuple[float, str]] = deque()
        """In order of time; may name what is no longer in `_sent`."""
        self.num_in_flight = 0
        self.unreported_prefill_tokens = self.unreported_kv_tokens = 0
        self.is_draining = self.is_unhealthy = False
        self._queued = self._resident = self._sequences = self._leases = 0
        self._held_blocks = self._usable_blocks = 0

    def attach(
        self,
        column: NDArray[np.float64],
        *,
        block_size: int,
        on_flags: Callable[[], None],
        on_report: Callable[[], None] | None = None,
    ) -> None:
        """Write into `column` from now on; `on_flags` when the worker starts or stops to drain or
        to be unhealthy, `on_report` after every report."""
        self._block_size = block_size
        self._column, self._on_flags, self._on_report = column, on_flags, on_report
        self._write()

    def detach(self) -> None:
        self._column = self._on_flags = self._on_report = None

    def report(self, load: LoadFigures, now_s: float) -> None:
        """The worker's load at the end of an engine step, as it arrives."""
        usable = load.free_blocks + load.cached_blocks
        self._usable_blocks, self._held_blocks = usable, load.total_blocks - usable
        self._queued = load.queued_prefill_tokens
        self._resident = load.resident_kv_tokens
        self._sequences = load.num_running + load.num_waiting + load.reservations
        self._leases = load.leases
        self._drop_reported(now_s - UNREPORTED_S)
        self._write()
        is_draining, is_unhealthy = load.is_draining, load.is_unhealthy
        if is_draining is not self.is_draining or is_unhealthy is not self.is_unhealthy:
            self.is_draining, self.is_unhealthy = is_draining, is_unhealthy
            if self._on_flags is not None:
                self._on_flags()
        if self._on_report is not None:
            self._on_report()

    def sent(
        self,
        request_id: str,
        *,
        prefill_tokens: int,
        kv_tokens: int,
        now_s: float,
        is_ours: bool = True,
    ) -> None:
        """A request is on its way to the worker. `is_ours` False: sent by another router, to be
        known here until the worker's next report and no longer."""
        self._sent[request_id] = _Sent(now_s, prefill_tokens, kv_tokens)
        self._order.append((now_s, request_id))
        self.unreported_prefill_tokens += prefill_tokens
        self.unreported_kv_tokens += kv_tokens
        self.num_in_flight += is_ours
        self._write()

    def ended(self, request_id: str) -> None:
        """One of ours has ended there or was taken back; to be called once."""
        self.num_in_flight -= 1
        self._discard(request_id)
        self._write()

    def clear(self) -> None:
        """The session is lost, and with it all that was sent."""
        self._sent.clear()
        self._order.clear()
        self.num_in_flight = 0
        self.unreported_prefill_tokens = self.unreported_kv_tokens = 0
        self._write()

    def figures(self) -> tuple[int, int, int, int, int]:
        """The column as it must be, in the order of `Column`."""
        block_size, unreported = self._block_size, self.unreported_kv_tokens
        return (
            self._queued + self.unreported_prefill_tokens,
            max(self._resident, self._held_blocks * block_size) + unreported,
            max(0, self._usable_blocks * block_size - unreported),
            max(self._sequences + len(self._sent), self.num_in_flight),
            self._leases,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when a sum is not that of its parts."""
        assert self.num_in_flight >= 0
        assert self.unreported_prefill_tokens == sum(s.prefill_tokens for s in self._sent.values())
        assert self.unreported_kv_tokens == sum(s.kv_tokens for s in self._sent.values())
        assert self._sent.keys() <= {request_id for _, request_id in self._order}
        if self._column is not None:
            assert tuple(self._column) == self.figures()

    def _drop_reported(self, seen_s: float) -> None:
        order = self._order
        while order and order[0][0] < seen_s:
            at_s, request_id = order.popleft()
            sent = self._sent.get(request_id)
            if sent is not None and sent.at_s == at_s:
                self._discard(request_id)

    def _discard(self, request_id: str) -> None:
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self.unreported_prefill_tokens -= sent.prefill_tokens
            self.unreported_kv_tokens -= sent.kv_tokens

    def _write(self) -> None:
        if self._column is not None:
            self._column[:] = self.figures()
