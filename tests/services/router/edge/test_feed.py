"""Several generations read as one."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest

from baton.core.errors import RequestCancelled, WorkerLost
from services.router.openai_api.feed import BUFFERED_DELTAS, DeltaFeed, SoloFeed, open_feed
from services.router.requests.generation import GenerationDelta


class Script:
    """Yields `count` deltas, then ends, fails or waits."""

    def __init__(self, count: int, *, error: Exception | None = None, waits: bool = False) -> None:
        self.count = count
        self.error = error
        self.waits = waits
        self.num_yielded = 0
        self.is_closed = False

    async def run(self):
        try:
            for i in range(self.count):
                self.num_yielded += 1
                yield [GenerationDelta(str(i))]
            if self.error is not None:
                raise self.error
            if self.waits:
                await asyncio.sleep(60)
        finally:
            self.is_closed = True


async def drain_all(feed: DeltaFeed) -> list[tuple[int, str]]:
    seen = []
    while items := await feed.take():
        seen += [(item.choice, item.delta.text) for item in items]
    return seen


async def test_all_deltas_come_in_order_per_choice():
    feed = DeltaFeed([Script(5).run(), Script(3).run()])
    seen = await drain_all(feed)
    assert [t for c, t in seen if c == 0] == list("01234")
    assert [t for c, t in seen if c == 1] == list("012")
    await feed.aclose()


async def test_what_is_ready_is_taken_together():
    feed = DeltaFeed([Script(50).run()])
    await asyncio.sleep(0)
    assert len(await feed.take()) == 50
    await feed.aclose()


async def test_error_comes_after_the_deltas_before_it_and_ends_the_others():
    other = Script(1, waits=True)
    feed = DeltaFeed([Script(2, error=WorkerLost("x")).run(), other.run()])
    seen = []
    with pytest.raises(WorkerLost):
        while True:
            seen += await feed.take()
    assert [item.delta.text for item in seen if item.choice == 0] == ["0", "1"]
    await feed.aclose()
    assert other.is_closed


async def test_fail_closes_generations_at_once_and_wakes_the_reader():
    scripts = [Script(0, waits=True), Script(0, waits=True)]
    feed = DeltaFeed([s.run() for s in scripts])
    taking = asyncio.create_task(feed.take())
    await asyncio.sleep(0.01)
    feed.fail(RequestCancelled("gone"))
    with pytest.raises(RequestCancelled):
        await taking
    await asyncio.sleep(0)
    assert all(s.is_closed for s in scripts)
    await feed.aclose()


async def test_reading_stops_when_the_buffer_is_full():
    script = Script(3 * BUFFERED_DELTAS)
    feed = DeltaFeed([script.run()])
    await asyncio.sleep(0.01)
    assert script.num_yielded == BUFFERED_DELTAS
    assert len(await drain_all(feed)) == 3 * BUFFERED_DELTAS
    await feed.aclose()


async def test_closing_between_two_deltas_closes_the_generator():
    script = Script(3 * BUFFERED_DELTAS)
    feed = DeltaFeed([script.run()])
    await asyncio.sleep(0.01)
    await feed.aclose()
    assert script.is_closed


@pytest.mark.parametrize("started", [False, True])
async def test_closing_leaves_no_task_behind(started):
    before = asyncio.all_tasks()
    feed = DeltaFeed([Script(0, waits=True).run() for _ in range(3)])
    if started:
        await asyncio.sleep(0.01)
    await feed.aclose()
    assert asyncio.all_tasks() == before


# A single generation.


def test_single_generation_is_read_without_a_pump():
    assert isinstance(open_feed([Script(1).run()]), SoloFeed)


async def test_deltas_and_error_of_a_single_generation_come_in_order():
    feed = SoloFeed(Script(2, error=WorkerLost("x")).run())
    assert [await feed.take(), await feed.take()] == [
        [(0, GenerationDelta("0"))], [(0, GenerationDelta("1"))],
    ]  # fmt: skip
    with pytest.raises(WorkerLost):
        await feed.take()
    await feed.aclose()


async def test_fail_wakes_the_reader_and_closes_the_generation_and_nothing_else():
    script = Script(0, waits=True)
    feed = SoloFeed(script.run())

    async def read():
        with pytest.raises(RequestCancelled):
            await feed.take()
        # The reader's own task is not cancelled.
        await asyncio.sleep(0.001)
        return "went on"

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    feed.fail(RequestCancelled("gone"))
    feed.fail(RequestCancelled("twice"))
    assert await reading == "went on"
    assert not reading.cancelling()
    assert script.is_closed
    await feed.aclose()


async def test_fail_while_the_writer_is_busy_closes_the_generation_at_once():
    script = Script(3)
    feed = SoloFeed(script.run())
    await feed.take()
    feed.fail(RequestCancelled("gone"))
    await asyncio.sleep(0.01)
    assert script.is_closed
    with pytest.raises(RequestCancelled):
        await feed.take()
    await feed.aclose()


async def test_cancelling_the_reader_is_not_taken_for_a_failure():
    script = Script(0, waits=True)
    feed = SoloFeed(script.run())
    reading = asyncio.create_task(feed.take())
    await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await feed.aclose()
    assert script.is_closed


async def test_drain_lets_a_single_generation_come_to_its_own_end():
    before = asyncio.all_tasks()
    script = Script(3)
    feed = SoloFeed(script.run())
    await feed.take()
    await feed.drain(1.0)
    assert script.num_yielded == 3 and script.is_closed
    await feed.aclose()
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("count", [1, 2])
async def test_feed_that_failed_is_let_go_of_without_a_collection(count):
    async def read() -> None:
        feed = open_feed([Script(1, waits=True).run() for _ in range(count)])
        try:
            while True:
                await feed.take()
                asyncio.get_running_loop().call_later(0.01, feed.fail, RequestCancelled("gone"))
        finally:
            await feed.aclose()

    def num_feeds() -> int:
        return sum(type(o) in (SoloFeed, DeltaFeed) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    num_before = num_feeds()
    try:
        with contextlib.suppress(RequestCancelled):
            await read()
        assert num_feeds() <= num_before
    finally:
        gc.enable()
