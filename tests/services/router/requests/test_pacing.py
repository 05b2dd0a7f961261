"""Readers of tokens: woken at once by a loop that keeps up, together by one that does not."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from baton.core.request import FinishReason, TokenDelta
from services.router.requests.mailbox import Arrival, Mailbox
from services.router.requests.pacing import MAX_HOLD_S, MIN_BUSY_S, Pacer

SLOW_S = 5 * MIN_BUSY_S


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def waiter() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


async def write_for(pacer: Pacer, clock: Clock, seconds: float) -> None:
    """A burst whose writing takes so long."""
    woken = waiter()
    pacer.wake(woken)
    assert woken.done()
    clock.now_s += seconds
    await turns()


async def busy(pacer: Pacer, clock: Clock) -> None:
    await write_for(pacer, clock, SLOW_S)
    await write_for(pacer, clock, SLOW_S)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pacer(clock: Clock) -> Pacer:
    return Pacer(clock=clock)


async def test_loop_that_keeps_up_never_holds(pacer, clock):
    for _ in range(20):
        await write_for(pacer, clock, MIN_BUSY_S / 2)
    assert not pacer.num_held


async def test_one_long_call_in_between_is_no_reason(pacer, clock):
    for _ in range(5):
        await write_for(pacer, clock, 50 * SLOW_S)
        await write_for(pacer, clock, MIN_BUSY_S / 2)


async def test_readers_of_one_burst_are_all_woken_at_once(pacer, clock):
    await busy(pacer, clock)
    clock.now_s += 1.0
    burst = [waiter() for _ in range(10)]
    for one in burst:
        pacer.wake(one)
        clock.now_s += SLOW_S
    assert all(one.done() for one in burst)


async def test_loop_that_is_behind_lets_tokens_gather_and_wakes_all_together(pacer, clock):
    await busy(pacer, clock)
    held = [waiter() for _ in range(10)]
    for one in held:
        pacer.wake(one)
        pacer.wake(one)
    assert pacer.num_held == 10 and not any(one.done() for one in held)
    async with asyncio.timeout(5):
        await asyncio.gather(*held)
    assert not pacer.num_held


async def test_hold_is_bounded_and_ends_with_the_time(pacer, clock):
    await write_for(pacer, clock, 1000 * SLOW_S)
    await write_for(pacer, clock, 1000 * SLOW_S)
    clock.now_s += MAX_HOLD_S
    woken = waiter()
    pacer.wake(woken)
    assert woken.done()


async def test_reader_that_leaves_meanwhile_is_passed_over(pacer, clock):
    await busy(pacer, clock)
    gone, stays = waiter(), waiter()
    pacer.wake(gone)
    pacer.wake(stays)
    gone.cancel()
    async with asyncio.timeout(5):
        await stays


def token(k: int, finish: FinishReason | None = None) -> Arrival:
    return Arrival("w", 0.0, TokenDelta("r", k, [k], finish_reason=finish))


async def take_one(mailbox: Mailbox) -> asyncio.Task[list[Arrival]]:
    taking = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    return taking


@pytest.mark.parametrize(
    "urgent", [token(1, FinishReason.LENGTH), Arrival("w", 0.0, lost="gone")], ids=["end", "loss"]
)
async def test_first_tokens_ends_and_bad_news_are_not_held(pacer, clock, urgent):
    mailbox = Mailbox(8, now_s=0.0, pacer=pacer)
    await busy(pacer, clock)
    for arrival, num_held in ((token(0), 0), (token(1), 1)):
        taking = await take_one(mailbox)
        mailbox.put(arrival, 0.0)
        assert pacer.num_held == num_held
        if not num_held:
            await taking
    mailbox.put(urgent, 0.0)
    await asyncio.sleep(0)
    assert await taking == [token(1), urgent], "what is held goes with it, in order"


@pytest.mark.parametrize("seed", range(4))
async def test_every_token_arrives_in_order_whatever_the_load(seed):
    rng = random.Random(seed)
    pacer, num_tokens = Pacer(), 60
    mailboxes = [Mailbox(4, now_s=0.0, pacer=pacer) for _ in range(12)]

    async def read(mailbox: Mailbox) -> list[int]:
        ids: list[int] = []
        while len(ids) < num_tokens:
            for arrival in await mailbox.take():
                ids += arrival.delta.token_ids
            if rng.random() < 0.2:
                time.sleep(rng.random() * MIN_BUSY_S)
        return ids

    reading = [asyncio.create_task(read(mailbox)) for mailbox in mailboxes]
    for k in range(num_tokens):
        for mailbox in mailboxes:
            mailbox.put(token(k), 0.0)
        await asyncio.sleep(rng.choice((0, 0, 0.001)))
    async with asyncio.timeout(10):
        assert await asyncio.gather(*reading) == [list(range(num_tokens))] * len(mailboxes)
