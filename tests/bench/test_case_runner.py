"""Cases within a budget: what is checked, timed, noted, and left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.gpu.case_runner import Budget, CaseRunner
from bench.gpu.cases import OURS, Bound, Case, PlannedCase
from bench.gpu.ceilings import Ceilings
from bench.gpu.report import CaseResult, Status
from bench.gpu.timing import Call, Timing

CEILINGS = Ceilings(4e12, 4e12, 8e14, 16e14)


class Clock:
    """Time that passes only when a case says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def passing(self, seconds: float) -> Callable[[], object]:
        def call() -> None:
            self.now_s += seconds

        return call


def case(name: str, *, group: str = "g", error: float = 0.0, **peers: Call) -> Case:
    contenders: dict[str, list[Call]] = {OURS: [int]} | {n: [c] for n, c in peers.items()}
    return Case(group, name, 4e9, 0.0, Bound.COPY, contenders, lambda: error, 0.01)


def planned(one: Case, before: Callable[[], object] = int) -> PlannedCase:
    def build() -> Case:
        before()
        return one

    return PlannedCase(one.group, one.name, build)


def one_millisecond(contenders: Mapping[str, Sequence[Call]]) -> Mapping[str, Timing]:
    return {name: Timing(1e-3, 0.0) for name in contenders}


def runner(clock: Clock | None = None, *, is_alive: bool = True) -> CaseRunner:
    return CaseRunner(
        CEILINGS, one_millisecond, lambda result: None, lambda: is_alive, clock or Clock()
    )


def raising(message: str) -> Call:
    def call() -> object:
        raise RuntimeError(message)

    return call


def test_case_is_timed_once_its_result_is_right() -> None:
    result = runner().measure(planned(case("right", error=0.005)))

    assert result.status is Status.TIMED
    assert result.share_of_limit() == 1.0


def test_wrong_result_is_not_timed() -> None:
    for error in (0.02, float("nan")):
        result = runner().measure(planned(case("wrong", error=error)))

        assert result.status is Status.WRONG
        assert result.timings == {}
        assert "WRONG" in result.row()


def test_peer_that_raises_is_noted_and_left_out() -> None:
    result = runner().measure(planned(case("c", good=int, bad=raising("no such dtype\nmore"))))

    assert set(result.timings) == {OURS, "good"}
    assert result.notes == {"bad": "RuntimeError: no such dtype"}


def test_case_that_cannot_be_built_fails_alone() -> None:
    cases = [planned(case("a"), raising("out of memory")), planned(case("b"))]

    run = runner().run(cases, Budget(10, Clock()))

    assert [r.status for r in run.results] == [Status.FAILED, Status.TIMED]
    assert run.not_run == []


def test_cases_after_a_lost_device_are_listed() -> None:
    cases = [planned(case("a"), raising("illegal access")), planned(case("b", group="h"))]

    run = runner(is_alive=False).run(cases, Budget(10, Clock()))

    assert run.not_run == ["h: b (device lost by a)"]


def test_cases_that_would_end_late_are_listed() -> None:
    clock = Clock()
    cases = [planned(case(name), clock.passing(4)) for name in "abcd"]

    run = runner(clock).run(cases, Budget(9, clock))

    assert [r.name for r in run.results] == ["a", "b", "c"]
    assert run.not_run == ["g: d (out of time)"]


def test_slow_group_leaves_the_next_its_share() -> None:
    clock = Clock()
    slow = [planned(case(name), clock.passing(3)) for name in "abcd"]
    other = [planned(case(name, group="h"), clock.passing(1)) for name in "efgh"]

    run = runner(clock).run([*slow, *other], Budget(10, clock))

    assert [r.name for r in run.results] == ["a", "b", *"efgh"]
    assert run.not_run == ["g: c (out of time)", "g: d (out of time)"]


def test_what_one_group_leaves_is_there_for_others() -> None:
    clock = Clock()
    slow = [planned(case(name), clock.passing(3)) for name in "abcd"]
    quick = [planned(case(name, group="h"), clock.passing(0.1)) for name in "efgh"]

    run = runner(clock).run([*slow, *quick], Budget(14, clock))

    assert [r.name for r in run.results] == ["a", "b", *"efgh", "c", "d"]
    assert run.not_run == []


def test_every_result_is_handed_on_as_it_comes() -> None:
    seen: list[CaseResult] = []
    observed = CaseRunner(CEILINGS, None, seen.append, lambda: True)

    run = observed.run([planned(case("a")), planned(case("b"))], Budget(10))

    assert seen == run.results
    assert {r.status for r in seen} == {Status.CHECKED}
