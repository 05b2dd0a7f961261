"""A fake server on the test's own loop, and load tests against it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from baton.loadtest.load_test import LoadTest, run_load_test
from baton.loadtest.openai_target import HttpOptions, OpenAiTarget
from baton.loadtest.options import LoadOptions, Targets
from baton.loadtest.result import LoadResult
from baton.loadtest.workload import MadeUp
from baton.simulator.arrivals import RequestLengths
from fake_openai import FakeOpenAi


@pytest.fixture
async def fake() -> AsyncIterator[FakeOpenAi]:
    fake = FakeOpenAi()
    server = await fake.start()
    yield fake
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    handlers = [task for task in others if "_serve" in repr(task)]
    for task in handlers:
        task.cancel()
    await asyncio.gather(*handlers, return_exceptions=True)
    # A run that is over has left nothing behind.
    assert others <= set(handlers)


@pytest.fixture
def load(fake: FakeOpenAi) -> Callable[..., Any]:
    """A function that runs a load test against the fake."""

    async def run(
        options: LoadOptions,
        *,
        workload: MadeUp | None = None,
        targets: Targets | None = None,
        http: HttpOptions | None = None,
        on_start: Callable[..., None] = lambda runner: None,
        **more: Any,
    ) -> LoadResult:
        made = workload or MadeUp((RequestLengths(40, 8),))
        conversations = more.pop("conversations", None) or made.conversations(options.seed)
        wanted = http or HttpOptions(fake.url)

        def make_target(model: str, now: Callable[[], float]) -> OpenAiTarget:
            from dataclasses import replace

            return OpenAiTarget(replace(wanted, url=fake.url, model=model), now)

        test = LoadTest(make_target, conversations, options, targets or Targets(), **more)
        async with asyncio.timeout(30):
            return await run_load_test(test, on_start)

    return run
