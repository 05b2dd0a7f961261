"""The terms of the chosen and the best other candidates, each rendered from a sheet when somebody
first asks for it.

Does not know: how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import overload

from services.router.placement.candidates import BATCH_ROW, QUEUED_ROW, RESIDENT_ROW
from services.router.placement.placement import ScoreTerms
from services.router.placement.sheet import Sheet

NUM_BEST = 4
"""Of each role, beside the chosen ones."""


class LazyTerms(Sequence[ScoreTerms]):
    """The chosen ones come first and cost the least; lets go of the sheet when all are rendered."""

    __slots__ = ("_chosen", "_rendered", "_sheet")

    def __init__(self, sheet: Sheet, chosen: tuple[int, ...]) -> None:
        """`chosen`: positions of the workers that were taken."""
        self._sheet: Sheet | None = sheet
        self._chosen = chosen
        self._rendered: list[ScoreTerms] = []

    def __len__(self) -> int:
        return len(self._all())

    @overload
    def __getitem__(self, index: int) -> ScoreTerms: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ScoreTerms, ...]: ...
    def __getitem__(self, index: int | slice) -> ScoreTerms | tuple[ScoreTerms, ...]:
        if isinstance(index, slice):
            return tuple(self._all()[index])
        return self._all()[index]

    def __iter__(self) -> Iterator[ScoreTerms]:
        for number in range(len(self._chosen)):
            yield self._of_chosen(number)
        yield from self._all()[len(self._chosen) :]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def _of_chosen(self, number: int) -> ScoreTerms:
        while len(self._rendered) <= number:
            assert self._sheet is not None
            self._rendered.append(_render(self._sheet, self._chosen[len(self._rendered)]))
        return self._rendered[number]

    def _all(self) -> list[ScoreTerms]:
        if self._sheet is not None:
            self._of_chosen(len(self._chosen) - 1)
            others = _best_others(self._sheet, self._chosen)
            self._rendered += [_render(self._sheet, i) for i in others]
            self._sheet = None
        return self._rendered


def _best_others(sheet: Sheet, chosen: tuple[int, ...]) -> list[int]:
    """Positions of those with the lowest prefill and the lowest decode costs."""
    others: list[int] = []
    for cost, first in (
        (sheet.prefill_cost[: sheet.num_prefill], 0),
        (sheet.decode_cost, sheet.generators.start),
    ):
        best = [first + i for i in cost.argsort()[: NUM_BEST + len(chosen)].tolist()]
        others += [i for i in best if i not in chosen and i not in others][:NUM_BEST]
    return others


def _render(sheet: Sheet, i: int) -> ScoreTerms:
    info, loads = sheet.members[i].info, sheet.loads[:, i].tolist()
    blocks = sheet.cached_of(i)
    cached = int(blocks) * sheet.block_size
    compute_s = sheet.whole_s.item(i) - sheet.speeds.saved_s_of(i, blocks)
    at = i - sheet.generators.start
    has_decode = 0 <= at < len(sheet.decode_cost)
    local_cost = sheet.local_cost.item(at) if has_decode and sheet.local_cost.size else math.inf
    return ScoreTerms(
        info.worker_id,
        info.role,
        cached=cached,
        uncached=sheet.request.num_prompt_tokens - cached,
        queued_prefill=int(loads[QUEUED_ROW]),
        resident_kv=int(loads[RESIDENT_ROW]),
        num_sequences=int(loads[BATCH_ROW]),
        missing_kv=int(sheet.missing_of(i)) if has_decode else 0,
        prefill_cost=sheet.prefill_cost.item(i),
        decode_cost=sheet.decode_cost.item(at) if has_decode else 0.0,
        queue_s=sheet.queue_s_of(i),
        move_s=sheet.prefill_s_of(i) - compute_s,
        compute_s=compute_s,
        itl_s=sheet.itl_s_of(i) if has_decode else 0.0,
        local_cost=local_cost if math.isfinite(local_cost) else None,
    )
