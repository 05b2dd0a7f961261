"""What a request has cost is told even if its last delta had to go before."""

from __future__ import annotations

from baton.core.request import FinishReason, Work
from baton.core.worker_info import Role

PROMPT = tuple(range(1, 23))


async def test_cancelled_request_is_told_once_the_engine_lets_go(workers, make_request, wait_for):
    worker = await workers.start(step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=2000))
    await wait_for(lambda: len(router.tokens("a")) >= 3)
    await router.cancel("a")
    assert (await router.ended("a")).finish_reason is FinishReason.CANCELLED
    await wait_for(lambda: "a" in router.late_uses)
    assert router.late_uses["a"].num_steps >= 3 and router.late_uses["a"].seconds > 0
    await worker.assert_nothing_leaked()


async def test_request_that_ends_by_itself_says_it_with_its_last_delta(
    workers, make_request, wait_for
):
    worker = await workers.start()
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=5))
    end = await router.ended("a")
    assert end.timeline.engine.num_steps >= 5 and end.timeline.engine.seconds > 0
    await wait_for(lambda: router.load.num_steps >= 5)
    assert router.load.busy_seconds >= end.timeline.engine.seconds
    assert router.late_uses == {}
    await worker.assert_nothing_leaked()


async def test_request_that_was_never_computed_has_no_late_use(workers, make_request, wait_for):
    worker = await workers.start(Role.DECODE)
    router = await worker.router()
    await router.submit(make_request("gone", PROMPT, work=Work.GENERATE, max_tokens=2000))
    await router.cancel("gone")
    await router.ended("gone")
    await worker.assert_nothing_leaked()
    assert all(use.num_steps for use in router.late_uses.values())


async def test_router_that_has_left_is_not_told(workers, make_request, wait_for):
    worker = await workers.start(step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=2000))
    await wait_for(lambda: len(router.tokens("a")) >= 2)
    await router.close()
    await worker.assert_nothing_leaked()
