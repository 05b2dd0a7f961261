"""The terms of the chosen and the best other candidates, for the log; cut out of a sheet when
somebody first asks for one, and rendered one by one.

Does not know: how they came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from baton.core.worker_info import WorkerInfo
from services.router.placement.candidates import Floats
from services.router.placement.load_book import QUEUED, RESIDENT, SEQUENCES
from services.router.placement.placement import ScoreTerms
from services.router.placement.scoring import Sheet

NUM_BEST = 4
"""Of each role, beside the chosen ones."""


class _Cut(NamedTuple):
    """A few candidates of a sheet."""

    infos: tuple[WorkerInfo, ...]
    prefill: Floats
    """[cached, queue_s, move_s, compute_s, prefill_cost][candidate]"""
    decode: Floats
    """[decode_cost, itl_s, missing, local_cost][candidate]; nan: has no decode terms."""
    loads: Floats
    num_tokens: int


class LazyTerms(Sequence[ScoreTerms]):
    """Lets go of the sheet at the first look."""

    __slots__ = ("_chosen", "_cut", "_rendered", "_sheet")

    def __init__(self, sheet: Sheet, *chosen: int | None) -> None:
        """`chosen`: positions of the workers that were taken; they come first."""
        self._sheet: Sheet | None = sheet
        self._chosen = chosen
        self._cut: _Cut | None = None
        self._rendered: dict[int, ScoreTerms] = {}

    def __len__(self) -> int:
        return len(self._ready().infos)

    @overload
    def __getitem__(self, index: int) -> ScoreTerms: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScoreTerms, ...]: ...
    def __getitem__(self, index: int | slice) -> ScoreTerms | tuple[ScoreTerms, ...]:
        if isinstance(index, slice):
            return tuple(self)[index]
        number = range(len(self))[index]
        found = self._rendered.get(number)
        if found is None:
            found = self._rendered[number] = _render(self._ready(), number)
        return found

    def __iter__(self) -> Iterator[ScoreTerms]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self._ready().infos)

    def __repr__(self) -> str:
        return repr(tuple(self))

    def _ready(self) -> _Cut:
        if self._cut is None:
            assert self._sheet is not None
            self._cut = _cut(self._sheet, [c for c in self._chosen if c is not None])
            self._sheet = None
        return self._cut


def _cut(sheet: Sheet, picked: list[int]) -> _Cut:
    pool, start = sheet.pool, sheet.generators.start
    num_prefill = pool.num_prefill
    for cost, first in ((sheet.prefill_cost[:num_prefill], 0), (sheet.decode_cost, start)):
        best = cost.argsort()[: NUM_BEST + 1].tolist()
        others = [first + i for i in best if first + i not in picked]
        picked = picked + others[:NUM_BEST]
    prefill = np.array(
        (sheet.cached, sheet.queue_s, sheet.move_s, sheet.compute_s, sheet.prefill_cost)
    )
    decode = np.full((4, pool.num_candidates), np.nan)
    terms = (sheet.decode_cost, sheet.itl_s, sheet.missing, sheet.local_cost)
    for row, values in zip(decode, terms, strict=True):
        row[start : start + len(values)] = values
    return _Cut(
        tuple([pool.members[i].info for i in picked]),
        prefill[:, picked],
        decode[:, picked],
        sheet.loads[:, picked],
        sheet.request.num_prompt_tokens,
    )


def _render(cut: _Cut, i: int) -> ScoreTerms:
    info, loads = cut.infos[i], cut.loads[:, i].tolist()
    cached, queue_s, move_s, compute_s, prefill_cost = cut.prefill[:, i].tolist()
    decode_cost, itl_s, missing, local_cost = cut.decode[:, i].tolist()
    has_decode = not np.isnan(decode_cost)
    return ScoreTerms(
        info.worker_id,
        info.role,
        cached=int(cached),
        uncached=cut.num_tokens - int(cached),
        queued_prefill=int(loads[QUEUED]),
        resident_kv=int(loads[RESIDENT]),
        num_sequences=int(loads[SEQUENCES]),
        missing_kv=int(missing) if has_decode else 0,
        prefill_cost=prefill_cost,
        decode_cost=decode_cost if has_decode else 0.0,
        queue_s=queue_s,
        move_s=move_s,
        compute_s=compute_s,
        itl_s=itl_s if has_decode else 0.0,
        local_cost=local_cost if np.isfinite(local_cost) else None,
    )
