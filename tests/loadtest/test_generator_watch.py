"""A generator that is late says so."""

from __future__ import annotations

import asyncio
import time

import pytest

from baton.loadtest.generator_watch import GeneratorFigures, GeneratorWatch


async def watched(seconds: float, *, blocks_s: float, lags_s: list[float]) -> GeneratorFigures:
    watch = GeneratorWatch()
    task = asyncio.create_task(watch.run())
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        await asyncio.sleep(0.02)
        time.sleep(blocks_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return watch.figures(lags_s)


async def test_a_blocked_loop_is_seen_and_told() -> None:
    figures = await watched(1.1, blocks_s=0.06, lags_s=[0.0] * 50)
    assert figures.loop_late_p99_s > 0.02
    assert any("event loop was up to" in text for text in figures.warnings)
    assert not any("after they were due" in text for text in figures.warnings)


async def test_requests_behind_their_time_are_told() -> None:
    figures = await watched(1.1, blocks_s=0.0, lags_s=[0.5] * 10)
    assert (figures.lag_p50_s, figures.lag_max_s) == (0.5, 0.5)
    assert any("sent up to 500 ms after they were due" in text for text in figures.warnings)


async def test_a_busy_core_is_told_and_a_short_run_is_not_judged() -> None:
    busy = GeneratorWatch()
    task = asyncio.create_task(busy.run())
    await asyncio.sleep(0)
    until_s = time.process_time() + 1.1
    while time.process_time() < until_s:
        pass
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert busy.figures([]).cpu_share > 0
    short = await watched(0.1, blocks_s=0.05, lags_s=[9.0])
    assert short.warnings == ()
    assert short.lag_max_s == 9.0
