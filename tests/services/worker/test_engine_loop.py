import asyncio
import contextlib
import threading
import time

import pytest

from baton.core.block import BlockHash
from baton.core.clock import MonotonicClock
from baton.core.errors import InternalError, InvalidRequest, NotFound, Overloaded, Unavailable
from baton.core.lifecycle import Timeline
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.worker_info import LoadReport
from baton.engine.engine import BatchOutcome, StepOutput
from services.worker.config import HealthConfig
from services.worker.engine_api import StepResult
from services.worker.engine_loop import MAX_FAILED_STEPS, EngineLoop
from services.worker.health import Health


class FakeEngine:
    """Every request lives `num_steps` steps and makes one token and one stored block in each."""

    def __init__(self, num_steps: int = 3) -> None:
        self.left: dict[RequestId, int] = {}
        self.num_steps = num_steps
        self.num_step_calls = 0
        self.fail_steps = 0
        self.fail_batches = 0
        self.batch_size = 10**6
        self.step_s = 0.0
        self.cancelled: list[TokenDelta] = []
        self.threads: set[int] = set()
        self.stored = 0
        self.defect: Exception = RuntimeError("defect")

    @property
    def has_work(self) -> bool:
        return bool(self.left or self.cancelled)

    @property
    def is_empty(self) -> bool:
        return not self.left

    def submit(self, request):
        self.threads.add(threading.get_ident())
        if request.request_id == "bad":
            raise InvalidRequest("too long")
        if request.request_id == "full":
            raise Overloaded("queue is full")
        self.left[request.request_id] = self.num_steps

    def cancel(self, request_id):
        if self.left.pop(request_id, None) is not None:
            self.cancelled.append(
                TokenDelta(request_id, finish_reason=FinishReason.CANCELLED, timeline=Timeline())
            )

    def activate(self, request_id, first):
        raise NotFound(f"request {request_id} holds no reservation")

    def abandon(self, request_id, *, unsettled):
        raise NotFound(f"request {request_id} holds no reservation")

    def recover(self, block_ids):
        raise self.defect

    def release_lease(self, request_id):
        pass

    def step(self):
        self.num_step_calls += 1
        time.sleep(self.step_s)
        if self.fail_steps:
            self.fail_steps -= 1
            raise RuntimeError("device error")
        output = StepOutput(deltas=self.cancelled)
        self.cancelled = []
        batch = list(self.left)[: self.batch_size]
        if batch and self.fail_batches:
            self.fail_batches -= 1
            output.batch = BatchOutcome.FAILED
            for request_id in batch:
                del self.left[request_id]
                delta = TokenDelta(request_id, finish_reason=FinishReason.ERROR, is_retryable=True)
                output.deltas.append(delta)
            return output
        output.batch = BatchOutcome.COMPUTED if batch else BatchOutcome.NONE
        for request_id in batch:
            self.left[request_id] -= 1
            index = self.num_steps - self.left[request_id] - 1
            delta = TokenDelta(request_id, index, [index])
            if not self.left[request_id]:
                delta.finish_reason = FinishReason.LENGTH
                del self.left[request_id]
            output.deltas.append(delta)
            self.stored += 1
            output.stored.append(BlockHash(self.stored.to_bytes(16, "big")))
        return output

    def load(self):
        return LoadReport(num_running=len(self.left))

    def is_cached(self, block_hash):
        return block_hash in self.cached_hashes()

    def cached_hashes(self):
        return [BlockHash(n.to_bytes(16, "big")) for n in range(1, self.stored + 1)]

    def check_integrity(self):
        pass


def request(request_id: str) -> GenerateRequest:
    return GenerateRequest(RequestId(request_id), Work.GENERATE, (1, 2), SamplingParams())


class Collector:
    def __init__(self) -> None:
        self.results: list[StepResult] = []

    def __call__(self, result: StepResult) -> None:
        self.results.append(result)

    def deltas(self, request_id: str) -> list[TokenDelta]:
        return [d for r in self.results for d in r.output.deltas if d.request_id == request_id]

    async def ended(self, request_id: str) -> TokenDelta:
        async with asyncio.timeout(5):
            while True:
                last = [d for d in self.deltas(request_id) if d.finish_reason is not None]
                if last:
                    assert len(last) == 1
                    return last[0]
                await asyncio.sleep(0.002)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def steps():
    return Collector()


@pytest.fixture
async def loop(engine, steps):
    loop = EngineLoop(engine, on_step=steps, clock=MonotonicClock())
    loop.start()
    yield loop
    await loop.stop()
    assert not loop.is_alive


async def test_request_runs_to_its_end_on_the_engines_thread(loop, engine, steps):
    loop.submit(request("a"))
    assert (await steps.ended("a")).finish_reason is FinishReason.LENGTH
    assert [d.first_index for d in steps.deltas("a")] == [0, 1, 2]
    assert engine.threads and threading.get_ident() not in engine.threads


async def test_idle_loop_does_not_step(loop, engine, steps):
    loop.submit(request("a"))
    await steps.ended("a")
    await loop.ping()
    before = engine.num_step_calls
    await asyncio.sleep(0.2)
    assert engine.num_step_calls - before <= 1
    assert not loop.is_computing


@pytest.mark.parametrize(("name", "is_retryable"), [("bad", False), ("full", True)])
async def test_refused_submit_comes_back_as_error(loop, steps, name, is_retryable):
    loop.submit(request(name))
    delta = await steps.ended(name)
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.is_retryable is is_retryable
    assert delta.error


async def test_cancel_ends_a_running_request(loop, engine, steps):
    engine.num_steps = 10**6
    engine.step_s = 0.001
    loop.submit(request("a"))
    await asyncio.sleep(0.02)
    loop.cancel(RequestId("a"))
    assert (await steps.ended("a")).finish_reason is FinishReason.CANCELLED


async def test_commands_without_effect_do_no_harm(loop, steps):
    loop.activate(RequestId("x"), TokenDelta(RequestId("x"), 0, [1]))
    loop.abandon(RequestId("x"), unsettled=())
    loop.cancel(RequestId("x"))
    loop.submit(request("a"))
    assert (await steps.ended("a")).finish_reason is FinishReason.LENGTH
    assert not loop.is_broken


async def test_failed_step_ends_its_requests_and_the_loop_goes_on(loop, engine, steps):
    engine.fail_steps = 1
    engine.num_steps = 10**6
    loop.submit(request("a"))
    delta = await steps.ended("a")
    assert (delta.finish_reason, delta.is_retryable) == (FinishReason.ERROR, True)
    engine.num_steps = 2
    loop.submit(request("b"))
    assert (await steps.ended("b")).finish_reason is FinishReason.LENGTH
    assert not loop.is_broken


@pytest.mark.parametrize(
    "defect", [RuntimeError("defect"), InternalError("recover of block 1 refused: a law")]
)
async def test_defect_in_a_command_is_contained(loop, engine, steps, caplog, defect):
    engine.defect = defect
    engine.num_steps, engine.step_s = 10**6, 0.001
    loop.submit(request("a"))
    loop.recover([])
    assert (await steps.ended("a")).finish_reason is FinishReason.ERROR
    engine.num_steps = 2
    loop.submit(request("b"))
    assert (await steps.ended("b")).finish_reason is FinishReason.LENGTH


async def test_engine_that_keeps_failing_is_broken_and_refuses(loop, engine, steps):
    engine.fail_steps = 10**6
    for number in range(MAX_FAILED_STEPS + 1):
        loop.submit(request(f"a{number}"))
        await asyncio.sleep(0.02)
    for number in range(MAX_FAILED_STEPS + 1):
        delta = await steps.ended(f"a{number}")
        assert (delta.finish_reason, delta.is_retryable) == (FinishReason.ERROR, True)
        assert not delta.is_overload
    assert loop.is_broken
    before = engine.num_step_calls
    await asyncio.sleep(0.1)
    assert engine.num_step_calls == before
    verdict = await Health(loop, HealthConfig(), service_names=()).check()
    assert not verdict.is_healthy


async def test_engine_whose_every_batch_fails_is_broken(loop, engine, steps):
    engine.fail_batches, engine.batch_size = 10**6, 1
    engine.step_s = 0.01
    names = [f"a{number}" for number in range(MAX_FAILED_STEPS + 3)]
    for name in names:
        loop.submit(request(name))
    for name in names:
        delta = await steps.ended(name)
        assert (delta.finish_reason, delta.is_retryable) == (FinishReason.ERROR, True)
    await loop.ping()
    assert loop.is_broken and engine.num_step_calls == MAX_FAILED_STEPS
    assert steps.results[-1].load.is_unhealthy
    verdict = await Health(loop, HealthConfig(), service_names=()).check()
    assert not verdict.is_healthy


async def test_idle_steps_between_failed_batches_do_not_hide_them(loop, engine, steps):
    engine.fail_batches = MAX_FAILED_STEPS
    for number in range(MAX_FAILED_STEPS):
        loop.submit(request(f"a{number}"))
        await steps.ended(f"a{number}")
        loop.cancel(RequestId("unknown"))
        await loop.ping()
    assert loop.is_broken


async def test_failed_batches_between_computed_ones_do_not_break_the_engine(loop, engine, steps):
    for number in range(2 * MAX_FAILED_STEPS):
        engine.fail_batches = 1
        loop.submit(request(f"fails{number}"))
        await steps.ended(f"fails{number}")
        loop.submit(request(f"runs{number}"))
        assert (await steps.ended(f"runs{number}")).finish_reason is FinishReason.LENGTH
    assert not loop.is_broken


async def test_worker_that_stays_unhealthy_has_failed_and_one_that_recovers_has_not(
    loop, engine, steps
):
    verdicts = []
    config = HealthConfig(period_s=0.05, step_timeout_s=0.1, max_bad_verdicts=4)
    health = Health(loop, config, service_names=(), on_verdict=verdicts.append)
    watching = asyncio.create_task(health.watch())
    engine.step_s = 0.25
    loop.submit(request("a"))
    await steps.ended("a")
    engine.step_s = 0
    assert not all(verdict.is_healthy for verdict in verdicts)
    assert not health.failed.is_set()
    engine.step_s = 1.0
    loop.submit(request("b"))
    await asyncio.wait_for(health.failed.wait(), 5)
    engine.step_s = 0
    assert [verdict.is_healthy for verdict in verdicts[-4:]] == [False] * 4
    watching.cancel()


async def test_events_are_numbered_and_follow_the_snapshot(loop, engine, steps):
    engine.num_steps, engine.step_s = 200, 0.0005
    loop.submit(request("a"))
    await asyncio.sleep(0.02)
    snapshot = await loop.snapshot()
    await steps.ended("a")
    known = set(snapshot.cached_hashes)
    numbers = [r.kv_sequence for r in steps.results if r.has_kv_event]
    assert numbers == list(range(1, len(numbers) + 1))
    assert 0 < snapshot.kv_sequence < len(numbers)
    for result in steps.results:
        if result.has_kv_event and result.kv_sequence > snapshot.kv_sequence:
            known |= set(result.output.stored)
        elif result.has_kv_event:
            assert set(result.output.stored) <= known
    assert known == set(engine.cached_hashes())


async def test_health_notices_a_step_that_does_not_end(loop, engine, steps):
    engine.step_s = 0.5
    health = Health(loop, HealthConfig(step_timeout_s=0.1), service_names=())
    assert (await health.check()).is_healthy
    loop.submit(request("a"))
    await asyncio.sleep(0.3)
    verdict = await health.check()
    assert not verdict.is_healthy
    assert "limit 0.1 s" in verdict.reason
    engine.step_s = 0
    await steps.ended("a")
    assert (await health.check()).is_healthy


async def test_stop_ends_the_thread_in_the_middle_of_work(engine, steps):
    engine.num_steps = 10**6
    loop = EngineLoop(engine, on_step=steps, clock=MonotonicClock())
    loop.start()
    loop.submit(request("a"))
    await asyncio.sleep(0.01)
    await loop.stop()
    assert not loop.is_alive
    verdict = await Health(loop, HealthConfig(), service_names=()).check()
    assert not verdict.is_healthy


async def test_questions_to_a_stopped_loop_are_refused_not_left_open(engine, steps):
    engine.num_steps, engine.step_s = 10**6, 0.05
    loop = EngineLoop(engine, on_step=steps, clock=MonotonicClock())
    loop.start()
    loop.submit(request("a"))
    await asyncio.sleep(0.02)
    pending = asyncio.create_task(loop.ping())
    await asyncio.sleep(0)
    await loop.stop()
    async with asyncio.timeout(1):
        with contextlib.suppress(Unavailable):
            await pending
        with pytest.raises(Unavailable):
            await loop.snapshot()
