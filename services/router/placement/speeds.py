"""How fast each candidate of a pool computes and decodes, as rows that a request's or a worker's
figures are multiplied by. Seconds.

    coefficients of a role, a row each  x  what a worker differs by  =  speeds

The model learns with every few requests, so following it is cheap as well: of the second factor
only what has changed is looked up again.

Does not know: load, requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from baton.core.worker_info import Role, WorkerId
from services.router.placement.online_fit import RatioBook
from services.router.placement.perf_model import PerfModel

Floats = NDArray[np.float64]
NUM_ROWS = 12
_PROMPT, _BLOCK, _BLOCK_SQUARED = slice(0, 3), 3, 4
_LOAD, _STEP = slice(5, 9), slice(9, 12)
_PREFILL_ROWS, _DECODE_ROWS = slice(0, 6), slice(6, 12)
"""Those that the one and the other ratio of a worker is for."""


class Speeds(NamedTuple):
    """Arrays over candidates."""

    prompt: Floats
    """[3]: what a prompt takes as such, for each token, for each token squared: half a pair."""
    block: Floats
    """As the second of `prompt`, in blocks."""
    block_squared: Floats
    """As the third."""
    load: Floats
    """[4]: what a token queued takes, a sequence, a token of KV, and again a token of KV: the
    load in the rows of `COST_ROWS`."""
    step: Floats
    """[3]: what a decode step takes as such, for each sequence, for each token of KV."""

    def saved_s(self, blocks: Floats) -> Floats:
        """What computing so many leading blocks takes on each candidate."""
        saved_s: Floats = self.block_squared * blocks
        saved_s += self.block
        saved_s *= blocks
        return saved_s

    def saved_s_of(self, i: int, num_blocks: float) -> float:
        """The same of one candidate."""
        return (self.block_squared.item(i) * num_blocks + self.block.item(i)) * num_blocks


class SpeedBook:
    """Of the candidates of one pool, as far as one model has learned."""

    def __init__(self, ids: Sequence[WorkerId], num_prefill: int, block_size: int) -> None:
        """The first `num_prefill` workers prefill, the others decode."""
        self._position = {worker_id: i for i, worker_id in enumerate(ids)}
        self._role = np.array([i >= num_prefill for i in range(len(ids))], np.intp)
        self._block_size = block_size
        self._ratios = np.ones((NUM_ROWS, len(ids)))
        self._num_changes = [-1, -1]
        self._version = -1
        self._speeds: Speeds | None = None

    def speeds(self, perf: PerfModel) -> Speeds:
        """Not to be written to."""
        version = perf.version
        if self._speeds is None or version != self._version:
            self._follow(perf)
            coefficients = [self._coefficients(perf, role) for role in (Role.PREFILL, Role.DECODE)]
            rows: Floats = np.array(coefficients).T.take(self._role, axis=1) * self._ratios
            self._speeds = Speeds(
                rows[_PROMPT], rows[_BLOCK], rows[_BLOCK_SQUARED], rows[_LOAD], rows[_STEP]
            )
            self._version = version
        return self._speeds

    def _follow(self, perf: PerfModel) -> None:
        """Take over the ratios that have changed since the last time."""
        for number, (book, rows) in enumerate(
            zip(perf.ratio_books, (_PREFILL_ROWS, _DECODE_ROWS), strict=True)
        ):
            self._take_ratios(book, rows, book.changed_since(self._num_changes[number]))
            self._num_changes[number] = book.num_changes

    def _take_ratios(self, book: RatioBook, rows: slice, changed: Sequence[str] | None) -> None:
        for worker_id in self._position if changed is None else changed:
            position = self._position.get(WorkerId(worker_id))
            if position is not None:
                self._ratios[rows, position] = book.get(worker_id)

    def _coefficients(self, perf: PerfModel, role: Role) -> tuple[float, ...]:
        fixed_s, token_s, pair_s, queued_token_s = perf.prefill_speed(role)
        step_s, sequence_s, kv_token_s = perf.decode_speed(role)
        return (
            fixed_s, token_s, pair_s / 2,
            token_s * self._block_size, pair_s / 2 * self._block_size**2,
            queued_token_s, sequence_s, kv_token_s, kv_token_s,
            step_s, sequence_s, kv_token_s,
        )  # fmt: skip
