"""Runs planned cases within a time budget: build, check, time, forget.

Every case is checked on the very inputs it is timed on; one whose result is wrong is reported and
not timed. Not known here: what the cases compute, how results are shown.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from bench.gpu.cases import OURS, Case, PlannedCase
from bench.gpu.ceilings import Ceilings
from bench.gpu.report import CaseResult, Status
from bench.gpu.timing import Call, Timing

CaseTimer = Callable[[Mapping[str, Sequence[Call]]], Mapping[str, Timing]]
MAX_NOTE_CHARACTERS = 100
MAX_LEFT_OVER_BYTES = 4 << 30


class Budget:
    """Seconds that several parts share; what one leaves is there for the next."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + limit_s

    @property
    def left_s(self) -> float:
        return self._end - self._clock()

    def part(self, share: float) -> Budget:
        """A budget of its own over `share` of what is left."""
        return Budget(max(self.left_s, 0.0) * share, self._clock)


@dataclass(slots=True)
class Run:
    """What became of the planned cases."""

    results: list[CaseResult] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    """`group: name`, and why, of cases that were left out."""
    lost_by: str = ""
    """The case after which the device took no more work."""


@dataclass(frozen=True, slots=True)
class CaseRunner:
    """Measures cases against the ceilings of one card."""

    ceilings: Ceilings
    timer: CaseTimer | None
    """None checks results only."""
    on_result: Callable[[CaseResult], None]
    is_device_alive: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic

    def run(self, planned: Sequence[PlannedCase], budget: Budget) -> Run:
        """Groups share the budget by their numbers of cases.

        A case that would probably end after its group's time waits until all groups had theirs.
        What still does not fit is left out, as is everything after a case that broke the device.
        """
        run = Run()
        left_out = self._pass(planned, budget, run)
        left_out = self._pass(left_out, budget, run)
        why = f"device lost by {run.lost_by}" if run.lost_by else "out of time"
        run.not_run += [f"{case.group}: {case.name} ({why})" for case in left_out]
        return run

    def _pass(self, planned: Sequence[PlannedCase], budget: Budget, run: Run) -> list[PlannedCase]:
        """Returns the cases that were not run."""
        left_out: list[PlannedCase] = []
        num_left = len(planned)
        for _, cases_of_group in groupby(planned, key=lambda one: one.group):
            cases = list(cases_of_group)
            part = budget.part(len(cases) / num_left)
            num_left -= len(cases)
            durations_s = [0.0]
            for case in cases:
                if run.lost_by or part.left_s <= statistics.mean(durations_s):
                    left_out.append(case)
                    continue
                start = self.clock()
                result = self.measure(case)
                durations_s.append(self.clock() - start)
                run.results.append(result)
                self.on_result(result)
                if result.status is Status.FAILED and not self.is_device_alive():
                    run.lost_by = case.name
        return left_out

    def measure(self, planned: PlannedCase) -> CaseResult:
        try:
            result = self._measure(planned.build())
        except Exception as error:
            note = {OURS: brief(error)}
            result = CaseResult(planned.group, planned.name, Status.FAILED, notes=note)
        _release_memory()
        return result

    def _measure(self, case: Case) -> CaseResult:
        error = case.error()
        if not error <= case.error_limit:
            return CaseResult.of(case, self.ceilings, Status.WRONG, error, {}, {})
        notes = _failing_peers(case)
        if self.timer is None:
            return CaseResult.of(case, self.ceilings, Status.CHECKED, error, {}, notes)
        usable = {name: calls for name, calls in case.contenders.items() if name not in notes}
        timings = self.timer(usable)
        return CaseResult.of(case, self.ceilings, Status.TIMED, error, timings, notes)


def _release_memory() -> None:
    """The case's inputs and captured graphs are gone: room for the next one's."""
    if not torch.cuda.is_initialized():
        return
    if torch.cuda.memory_allocated() > MAX_LEFT_OVER_BYTES:
        # Something of the case hangs in a cycle; collecting takes long, so not every time.
        gc.collect()
    torch.cuda.empty_cache()


def _failing_peers(case: Case) -> dict[str, str]:
    """Peers that raise on their first inputs, and what they say."""
    notes = {}
    for name, calls in case.contenders.items():
        if name == OURS:
            continue
        try:
            calls[0]()
        except Exception as error:
            notes[name] = brief(error)
    return notes


def brief(error: BaseException) -> str:
    """One line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:MAX_NOTE_CHARACTERS]
