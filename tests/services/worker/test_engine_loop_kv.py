"""What the event loop asks of the engine beside requests: leases, imports, handovers, saves.

A real engine with the arithmetic runner, driven by a real loop.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from baton.core.block import chain_hashes
from baton.core.clock import MonotonicClock
from baton.core.errors import InvalidRequest, NotFound, Unavailable
from baton.core.request import FinishReason, RequestId, TokenDelta, Work
from services.worker.engine_api import StepResult
from services.worker.engine_loop import EngineLoop

NAME = RequestId("a")
PROMPT = [(5 + 13 * i) % 97 for i in range(13)]


def _load(name: str) -> ModuleType:
    qualified = f"engine_loop_kv_{name}"
    path = Path(__file__).parents[2] / "engine" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    spec.loader.exec_module(module)
    return module


fake = _load("fake_runner")
harness = _load("harness")
HASHES = chain_hashes(harness.ROOT, PROMPT, 4)


class Driven:
    """A loop with its engine, and what it has told."""

    def __init__(self) -> None:
        self.runner = fake.FakeRunner(64, 4, 97)
        self.engine = harness.make_engine(self.runner, num_blocks=64, vocab_size=97)
        self.results: list[StepResult] = []
        self.changed = asyncio.Event()
        self.loop = EngineLoop(self.engine, on_step=self._take, clock=MonotonicClock())

    def _take(self, result: StepResult) -> None:
        self.results.append(result)
        self.changed.set()

    @property
    def deltas(self) -> list[TokenDelta]:
        return [d for r in self.results for d in r.output.deltas if d.request_id == NAME]

    @property
    def chunks(self) -> list[Any]:
        return [c for r in self.results for c in r.output.chunks]

    def submit(self, work: Work = Work.GENERATE, max_tokens: int = 20, **fields: Any) -> None:
        request = harness.make_request(NAME, PROMPT, work=work, max_tokens=max_tokens, **fields)
        self.loop.submit(request)

    async def until(self, is_true: Any) -> None:
        async with asyncio.timeout(5):
            while not is_true():
                self.changed.clear()
                await self.changed.wait()

    async def frozen(self) -> Any:
        """A handover's last announcement."""
        await self.loop.start_handover(NAME, num_known_tokens=0)
        self.loop.freeze(NAME)
        await self.until(lambda: self.chunks and self.chunks[-1].is_last)
        return self.chunks[-1]

    async def assert_empty(self) -> None:
        await self.loop.check_integrity()
        assert await self.loop.is_empty()
        harness.assert_engine_empty(self.engine)


@pytest.fixture
async def driven() -> AsyncIterator[Driven]:
    driven = Driven()
    driven.loop.start()
    yield driven
    await driven.loop.stop()


async def slow_generation(driven: Driven) -> None:
    """A request that runs for as long as the test wants it to."""
    driven.submit(max_tokens=200, ignore_eos=True)
    launch = driven.runner.launch

    def slowly(batch: Any) -> Any:
        time.sleep(0.01)
        return launch(batch)

    driven.runner.launch = slowly
    await driven.until(lambda: len(driven.deltas) > 2)


async def test_request_handed_over_ends_once_and_without_a_reason(driven: Driven) -> None:
    await slow_generation(driven)
    last = await driven.frozen()
    tokens = [t for d in driven.deltas for t in d.token_ids]
    assert last.first_token.token_ids == tokens
    assert tokens == fake.expected_output(PROMPT, len(tokens), 97)
    driven.loop.finish_handover(NAME)
    await driven.until(lambda: driven.deltas[-1].timeline is not None)
    assert driven.deltas[-1].finish_reason is None
    # A second end of it has no effect.
    driven.loop.finish_handover(NAME)
    driven.loop.cancel(NAME)
    await driven.loop.ping()
    assert sum(d.timeline is not None for d in driven.deltas) == 1
    await driven.assert_empty()


async def test_failure_after_a_handover_is_no_failure_of_the_request(driven: Driven) -> None:
    await slow_generation(driven)
    await driven.frozen()

    def defect(block_ids: Any) -> None:
        raise RuntimeError("defect")

    driven.engine.recover = defect
    # Both commands come before the next step.
    driven.loop.finish_handover(NAME)
    driven.loop.recover([])
    await driven.until(lambda: driven.deltas[-1].timeline is not None)
    assert driven.deltas[-1].finish_reason is None


async def test_failure_of_the_engine_ends_a_frozen_request(driven: Driven) -> None:
    await slow_generation(driven)
    await driven.frozen()

    def defect(block_ids: Any) -> None:
        raise RuntimeError("defect")

    driven.engine.recover = defect
    driven.loop.recover([])
    await driven.until(lambda: driven.deltas[-1].timeline is not None)
    assert driven.deltas[-1].finish_reason is FinishReason.ERROR
    assert driven.deltas[-1].is_retryable
    driven.loop.release_lease(NAME)
    await driven.assert_empty()


async def test_resumed_request_runs_to_its_end(driven: Driven) -> None:
    await slow_generation(driven)
    await driven.frozen()
    driven.loop.release_lease(NAME)
    driven.loop.resume(NAME)
    await driven.until(lambda: len(driven.deltas) > 20)
    driven.loop.cancel(NAME)
    await driven.until(lambda: driven.deltas[-1].timeline is not None)
    tokens = [t for d in driven.deltas for t in d.token_ids]
    assert tokens == fake.expected_output(PROMPT, len(tokens), 97)
    await driven.assert_empty()


async def test_refused_handover_says_why(driven: Driven) -> None:
    with pytest.raises(NotFound, match="not on this worker"):
        await driven.loop.start_handover(NAME, num_known_tokens=0)
    await slow_generation(driven)
    with pytest.raises(InvalidRequest, match="cannot know 500"):
        await driven.loop.start_handover(NAME, num_known_tokens=500)


async def test_import_and_leases_and_saves(driven: Driven) -> None:
    loop = driven.loop
    reservation = await loop.reserve_import(RequestId("f"), HASHES)
    assert reservation is not None
    values = fake.fingerprints(PROMPT)
    blocks = [values[4 * i : 4 * i + 4] for i in range(3)]
    driven.runner.write_blocks(reservation.block_ids, blocks)
    loop.finish_import(RequestId("f"), num_blocks=3)
    await driven.until(lambda: driven.results and driven.results[-1].has_kv_event)
    assert driven.results[-1].output.stored == HASHES
    assert await loop.lease_prefix(RequestId("l"), HASHES) == reservation.block_ids
    loop.release_lease(RequestId("l"))
    taken = await loop.take_unsaved(8)
    assert [block_id for _, block_id in taken] == [*reservation.block_ids[::-1]]
    loop.release_saved([block_id for _, block_id in taken], is_saved=True)
    assert await loop.take_unsaved(8) == []
    await loop.reserve_import(RequestId("g"), HASHES[::-1])
    loop.abandon_import(RequestId("g"), unsettled=())
    await driven.assert_empty()


@pytest.mark.parametrize("is_answered", [False, True])
async def test_whoever_is_cancelled_while_waiting_leaves_nothing_behind(
    driven: Driven, is_answered: bool
) -> None:
    """Before the answer came, or with the answer there and not taken yet."""
    await slow_generation(driven)
    chain = chain_hashes(harness.ROOT, [7] * 12, 4)
    questions = (
        driven.loop.lease_prefix(RequestId("l"), HASHES),
        driven.loop.reserve_import(RequestId("f"), chain),
        driven.loop.start_handover(NAME, num_known_tokens=0),
        driven.loop.take_unsaved(4),
    )
    for question in questions:
        asking = asyncio.create_task(question)
        await asyncio.sleep(0)
        if is_answered:
            # The answer is posted while the event loop stands still.
            time.sleep(0.1)
            asyncio.get_running_loop().call_soon(asking.cancel)
        else:
            asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    driven.loop.cancel(NAME)
    await driven.until(lambda: driven.deltas[-1].timeline is not None)
    for _ in range(3):
        await driven.loop.ping()
        await asyncio.sleep(0)
    await driven.assert_empty()


async def test_what_cannot_belong_to_a_reserved_request_ends_it_with_an_error(
    driven: Driven,
) -> None:
    driven.submit(Work.TAKEOVER, output_token_ids=(3, 4))
    await driven.until(lambda: any(r.output.reservations for r in driven.results))
    driven.loop.activate(NAME, TokenDelta(NAME, 7, [1]))
    await driven.until(lambda: driven.deltas)
    (delta,) = driven.deltas
    assert (delta.finish_reason, delta.is_retryable) == (FinishReason.ERROR, True)
    assert "output 7 arrived where 2 is next" in delta.error
    await driven.assert_empty()


async def test_what_cannot_belong_to_a_cancelled_request_is_not_told(driven: Driven) -> None:
    driven.submit(Work.TAKEOVER)
    await driven.until(lambda: any(r.output.reservations for r in driven.results))
    driven.loop.cancel(NAME)
    await driven.until(lambda: driven.deltas)
    driven.loop.activate(NAME, TokenDelta(NAME, 7, [1]))
    await driven.assert_empty()
    assert [d.finish_reason for d in driven.deltas] == [FinishReason.CANCELLED]


async def test_nothing_is_asked_of_a_stopped_loop(driven: Driven) -> None:
    await driven.loop.stop()
    with pytest.raises(Unavailable, match="has stopped"):
        await driven.loop.take_unsaved(1)
