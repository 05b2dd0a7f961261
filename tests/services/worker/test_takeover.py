"""A running request moves to another worker: its stream goes on without a gap or a repetition."""

import asyncio
import dataclasses

import pytest

from baton.core.request import FinishReason, PeerRef, Work
from baton.core.worker_info import Epoch, Role

PROMPT = tuple(range(1, 40))
NUM_TOKENS = 120


@pytest.fixture(params=[1, 2], ids=["depth1", "depth2"])
def depth(request):
    """Steps that the workers' runners have in flight."""
    return request.param


@pytest.fixture
async def pair(workers, depth):
    """The worker that generates, the one that takes over, and a router's session to each."""
    old = await workers.start(Role.DECODE, step_s=0.005, max_in_flight=depth, lease_s=1.0)
    new = await workers.start(Role.DECODE, step_s=0.005, max_in_flight=depth)
    return old, new, await old.router(), await new.router()


@pytest.fixture
def generate(make_request, wait_for):
    """Submits a request to the old worker and waits until it has made some tokens."""

    async def run(router, name="a", num_tokens=10, **fields):
        fields.setdefault("max_tokens", NUM_TOKENS)
        await router.submit(make_request(name, PROMPT, **fields))
        await wait_for(lambda: len(router.tokens(name)) >= num_tokens)

    return run


@pytest.fixture
def take_over(make_request):
    """Submits the request to the new worker, as a router that knows the tokens so far does."""

    async def run(old, on_old, on_new, name="a", peer=None, known=None, **fields):
        fields.setdefault("max_tokens", NUM_TOKENS)
        known = tuple(on_old.tokens(name) if known is None else known)
        await on_new.submit(
            make_request(
                name,
                PROMPT,
                work=Work.TAKEOVER,
                peer=peer or old.peer,
                output_token_ids=known,
                **fields,
            )
        )

    return run


async def assert_all_well(*workers):
    for worker in workers:
        await worker.assert_nothing_leaked()


async def test_new_worker_goes_on_where_the_old_one_stopped(pair, generate, take_over, expected):
    old, new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    end = await on_new.ended("a")
    handed_on = await on_old.ended("a")
    assert handed_on.finish_reason is None and handed_on.timeline is not None
    assert end.finish_reason is FinishReason.LENGTH
    before, after = on_old.tokens("a"), on_new.tokens("a")
    assert before + after == expected(PROMPT, NUM_TOKENS)
    assert on_new.deltas["a"][0].first_index == len(before)
    assert 10 <= len(before) < NUM_TOKENS
    assert end.timeline.transfer.num_blocks >= 10
    await assert_all_well(old, new)


async def test_stream_moves_twice_and_back(pair, generate, take_over, expected):
    old, new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    await on_old.ended("a")
    while len(on_new.tokens("a")) < 10:
        await asyncio.sleep(0.005)
    before = on_old.tokens("a")
    known = before + on_new.tokens("a")
    back = await old.router("second")
    await take_over(new, on_new, back, known=known)
    await back.ended("a")
    assert before + on_new.tokens("a") + back.tokens("a") == expected(PROMPT, NUM_TOKENS)
    await assert_all_well(old, new)


async def test_takeover_counts_and_names_its_pause(pair, generate, take_over, wait_for):
    old, _new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    await on_new.ended("a")
    await wait_for(lambda: on_new.fabric is not None and on_new.fabric.counters.takeovers == 1)
    assert on_new.fabric.counters.takeover_pause_seconds > 0


async def test_request_that_came_by_hand_off_can_be_taken_over(
    workers, pair, generate, take_over, make_request, wait_for, expected
):
    old, new, on_old, on_new = pair
    prefill = await workers.start(Role.PREFILL)
    on_prefill = await prefill.router()
    fields = {"max_tokens": NUM_TOKENS}
    await on_old.submit(make_request("a", PROMPT, work=Work.DECODE, peer=prefill.peer, **fields))
    await on_prefill.submit(make_request("a", PROMPT, work=Work.PREFILL, **fields))
    await wait_for(lambda: len(on_old.tokens("a")) > 10)
    known = on_prefill.tokens("a") + on_old.tokens("a")
    await take_over(old, on_old, on_new, known=known)
    await on_new.ended("a")
    tokens = on_prefill.tokens("a") + on_old.tokens("a") + on_new.tokens("a")
    assert tokens == expected(PROMPT, NUM_TOKENS)
    await assert_all_well(prefill, old, new)


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.02, 0.04, 0.08])
async def test_cancelled_takeover_leaves_the_request_where_it_is(
    pair, generate, take_over, expected, delay_s
):
    old, new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    await asyncio.sleep(delay_s)
    has_moved = bool(on_old.ends("a"))
    await on_new.cancel("a")
    end = await on_new.ended("a")
    if not has_moved and end.finish_reason is FinishReason.CANCELLED and not on_new.tokens("a"):
        handed_on = await on_old.ended("a")
        if handed_on.finish_reason is not None:
            assert on_old.tokens("a") == expected(PROMPT, NUM_TOKENS)
    tokens = on_old.tokens("a") + on_new.tokens("a")
    assert tokens == expected(PROMPT, NUM_TOKENS)[: len(tokens)]
    await assert_all_well(old, new)


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.06])
async def test_cancelled_on_both_sides_at_any_time(pair, generate, take_over, expected, delay_s):
    old, new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    await asyncio.sleep(delay_s)
    await on_old.cancel("a")
    await on_new.cancel("a")
    await on_new.ended("a")
    await on_old.ended("a")
    tokens = on_old.tokens("a") + on_new.tokens("a")
    assert tokens == expected(PROMPT, NUM_TOKENS)[: len(tokens)]
    await assert_all_well(old, new)


async def test_request_that_ends_first_is_refused_to_the_new_worker(
    pair, generate, take_over, expected
):
    old, new, on_old, on_new = pair
    await generate(on_old, num_tokens=1, max_tokens=12)
    await take_over(old, on_old, on_new, known=expected(PROMPT, 12)[:1], max_tokens=12)
    end = await on_new.ended("a")
    on_old_end = await on_old.ended("a")
    if on_old_end.finish_reason is not None:
        assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    assert on_old.tokens("a") + on_new.tokens("a") == expected(PROMPT, 12)
    await assert_all_well(old, new)


async def test_unknown_request_is_refused(pair, take_over):
    old, new, on_old, on_new = pair
    await take_over(old, on_old, on_new, known=(1, 2))
    end = await on_new.ended("a")
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    await assert_all_well(old, new)


async def test_reader_that_knows_tokens_the_owner_never_made_is_refused(
    pair, generate, take_over, expected
):
    old, new, on_old, on_new = pair
    await generate(on_old)
    known = (*expected(PROMPT, NUM_TOKENS), 1, 2, 3)
    await take_over(old, on_old, on_new, known=known, max_tokens=NUM_TOKENS + 50)
    end = await on_new.ended("a")
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    await on_old.ended("a")
    assert on_old.tokens("a") == expected(PROMPT, NUM_TOKENS)
    await assert_all_well(old, new)


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05])
async def test_lost_new_worker_is_not_noticed_by_the_client(
    pair, generate, take_over, expected, delay_s
):
    old, new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    await asyncio.sleep(delay_s)
    await new.server.stop(drain_s=0)
    end = await on_old.ended("a", timeout_s=15)
    if end.finish_reason is not None:
        assert on_old.tokens("a") == expected(PROMPT, NUM_TOKENS)
    await assert_all_well(old)


@pytest.mark.parametrize("has_read_all", [False, True])
async def test_request_that_stands_still_goes_on_when_the_stream_between_the_workers_breaks(
    pair, generate, take_over, expected, monkeypatch, has_read_all
):
    """The new worker is alive and back in a moment, but the client does not wait for that."""
    old, new, on_old, on_new = pair
    leases = old.server.parts.leases
    limits = dataclasses.replace(leases._owner._limits, frozen_s=60.0)
    leases._owner._table._limits = limits
    if has_read_all:
        complete = leases._owner.complete

        def break_before(*args):
            monkeypatch.setattr(leases._owner, "complete", complete)
            leases._apply(leases._owner.reader_gone(args[0]))
            leases.close()
            return complete(*args)

        monkeypatch.setattr(leases._owner, "complete", break_before)
    else:
        freeze = leases._engine.freeze

        def break_after(request_id):
            freeze(request_id)
            leases.close()

        monkeypatch.setattr(leases._engine, "freeze", break_after)
    await generate(on_old)
    await take_over(old, on_old, on_new)
    end = await on_new.ended("a")
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    assert (await on_old.ended("a")).finish_reason is FinishReason.LENGTH
    assert on_old.tokens("a") == expected(PROMPT, NUM_TOKENS)
    await assert_all_well(old, new)


async def test_lost_old_worker_is_a_quick_retryable_error(pair, generate, take_over, expected):
    old, new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    await old.server.stop(drain_s=0)
    end = await on_new.ended("a", timeout_s=6)
    tokens = on_old.tokens("a") + on_new.tokens("a")
    assert tokens == expected(PROMPT, NUM_TOKENS)[: len(tokens)]
    if end.finish_reason is not FinishReason.LENGTH:
        assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    await assert_all_well(new)


async def test_router_lost_by_the_old_worker_ends_the_takeover(pair, generate, take_over):
    old, new, on_old, on_new = pair
    await generate(on_old)
    await take_over(old, on_old, on_new)
    await on_old.close()
    await on_new.ended("a")
    await assert_all_well(old, new)


async def test_restarted_old_worker_has_nothing_to_hand_on(pair, generate, take_over):
    old, new, on_old, on_new = pair
    await generate(on_old)
    stale = PeerRef(old.peer.worker_id, Epoch("before"), old.peer.address)
    await take_over(old, on_old, on_new, peer=stale)
    end = await on_new.ended("a")
    assert end.is_retryable and "restarted" in end.error
    await on_old.cancel("a")
    await assert_all_well(old, new)


async def test_new_worker_without_room_leaves_the_request_where_it_is(
    workers, generate, take_over, make_request, expected
):
    old = await workers.start(Role.DECODE, step_s=0.005, lease_s=1.0)
    new = await workers.start(Role.DECODE, step_s=0.005, num_blocks=40)
    on_old, on_new = await old.router(), await new.router()
    other = tuple(range(50, 90))
    await on_new.submit(make_request("busy", other, max_tokens=100))
    await generate(on_old)
    await take_over(old, on_old, on_new, deadline_s=0.3)
    await on_new.ended("a")
    end = await on_old.ended("a")
    tokens = on_old.tokens("a") + on_new.tokens("a")
    assert tokens == expected(PROMPT, NUM_TOKENS)[: len(tokens)]
    if end.finish_reason is not None:
        assert on_old.tokens("a") == expected(PROMPT, NUM_TOKENS)
    await on_new.ended("busy")
    assert on_new.tokens("busy") == expected(other, 100)
    await assert_all_well(old, new)


async def test_draining_worker_is_empty_when_its_requests_were_taken_over(
    pair, generate, take_over, expected
):
    old, new, on_old, on_new = pair
    await generate(on_old, max_tokens=1000)
    draining = asyncio.create_task(old.server.parts.drain.run(timeout_s=8))
    await asyncio.sleep(0.05)
    assert not draining.done()
    await take_over(old, on_old, on_new, max_tokens=1000)
    assert await draining == 0
    assert not on_new.ends("a")
    await on_new.cancel("a")
    await on_new.ended("a")
    tokens = on_old.tokens("a") + on_new.tokens("a")
    assert tokens == expected(PROMPT, 1000)[: len(tokens)]
    await assert_all_well(old, new)
