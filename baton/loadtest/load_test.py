"""One load test from its options to its result: ask, calibrate, run, sum up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from baton.loadtest.calibration import choose_model, measure_token_cost, wait_until_there
from baton.loadtest.figures import figures_of
from baton.loadtest.generator_watch import GeneratorWatch, RunClock
from baton.loadtest.options import LoadOptions, Targets
from baton.loadtest.prompt_text import TokenCost
from baton.loadtest.result import LoadResult
from baton.loadtest.runner import LoadRunner, Wording
from baton.loadtest.target import Target
from baton.loadtest.timeline import timeline_of
from baton.loadtest.workload import Conversation

MakeTarget = Callable[[str, Callable[[], float]], Target]
"""Model name (empty: not known yet) and the run's clock."""


@dataclass(frozen=True, slots=True)
class LoadTest:
    make_target: MakeTarget
    conversations: Iterable[Conversation]
    """In order of their times in an open loop; taken once."""
    options: LoadOptions
    targets: Targets
    model: str = ""
    """Empty: the first one served."""
    wait_s: float = 0.0
    """For the server to be there."""
    vocab_size: int | None = None
    has_lengths: bool = True
    """Prompts are made up from lengths, so what a word costs must be known."""
    setup: Mapping[str, object] = field(default_factory=dict)


Watcher = Callable[[LoadRunner], None]
"""Told of the run when it begins."""


async def run_load_test(test: LoadTest, on_start: Watcher = lambda runner: None) -> LoadResult:
    """Raises what calibration raises; afterwards failures are figures."""
    clock = RunClock()
    model = await _model(test, clock)
    target = test.make_target(model, clock)
    try:
        run_name = f"{test.options.seed:x}-{time.time_ns() & 0xFFFFFFFF:x}"
        cost = TokenCost()
        if test.has_lengths and test.vocab_size is None:
            cost = await measure_token_cost(target, clock, run_name)
        wording = Wording(cost, run_name, test.vocab_size)
        runner = LoadRunner(target, wording, test.options, clock)
        return await _run(test, runner, clock, on_start, model)
    finally:
        await target.aclose()


async def _model(test: LoadTest, clock: RunClock) -> str:
    target = test.make_target("", clock)
    try:
        return choose_model(test.model, await wait_until_there(target, test.wait_s))
    finally:
        await target.aclose()


async def _run(
    test: LoadTest, runner: LoadRunner, clock: RunClock, on_start: Watcher, model: str
) -> LoadResult:
    watch = GeneratorWatch()
    watching = asyncio.create_task(watch.run())
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        on_start(runner)
        clock.restart()
        await runner.run(test.conversations, is_open=test.options.concurrency is None)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    outcomes = runner.outcomes
    lags = [lag for o in outcomes if (lag := o.lag_s) is not None]
    cost = runner.wording.cost
    return LoadResult(
        started_at=started_at,
        place=runner.target.place,
        model=model,
        setup={
            **test.setup,
            "tokens per word": round(cost.per_word, 3),
            "tokens beyond words": round(cost.per_request, 1),
        },
        targets=test.targets,
        figures=figures_of(outcomes, test.targets),
        timeline=timeline_of(outcomes, test.targets),
        generator=watch.figures(lags),
        outcomes=outcomes,
        is_stopped=runner.is_stopped,
    )
