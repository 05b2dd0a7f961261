import asyncio
import random
import time

import pytest

from baton.core.lifecycle import LifecycleEvent
from baton.core.request import FinishReason, PeerRef, Work
from baton.core.worker_info import Epoch, Role, WorkerId

PROMPT = tuple(range(1, 40))


@pytest.fixture(params=[1, 2], ids=["depth1", "depth2"])
def depth(request):
    """Steps that the workers' runners have in flight."""
    return request.param


@pytest.fixture
async def pair(workers, depth):
    """A prefill worker, a decode worker and a router's session to each."""
    prefill = await workers.start(Role.PREFILL, max_in_flight=depth)
    decode = await workers.start(Role.DECODE, max_in_flight=depth)
    return prefill, decode, await prefill.router(), await decode.router()


@pytest.fixture
def hand_off(make_request):
    """Submits both halves of a request."""

    async def submit(name, prompt, prefill, on_prefill, on_decode, **fields):
        await on_decode.submit(
            make_request(name, prompt, work=Work.DECODE, peer=prefill.peer, **fields)
        )
        await on_prefill.submit(make_request(name, prompt, work=Work.PREFILL, **fields))

    return submit


async def test_decode_goes_on_where_prefill_ended(pair, hand_off, expected):
    prefill, decode, on_prefill, on_decode = pair
    await hand_off("a", PROMPT, prefill, on_prefill, on_decode, max_tokens=12)
    first = await on_prefill.ended("a")
    end = await on_decode.ended("a")
    assert first.finish_reason is None and first.timeline is not None
    assert on_prefill.tokens("a") + on_decode.tokens("a") == expected(PROMPT, 12)
    assert on_decode.deltas["a"][0].first_index == 1
    assert end.finish_reason is FinishReason.LENGTH
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


async def test_time_line_of_a_hand_off_is_complete(pair, hand_off):
    prefill, _, on_prefill, on_decode = pair
    await hand_off("a", PROMPT, prefill, on_prefill, on_decode, max_tokens=12)
    timeline = (await on_decode.ended("a")).timeline
    points = [
        timeline.points[event] for event in LifecycleEvent if event >= LifecycleEvent.PREFILL_QUEUED
    ]
    assert len(points) == 8
    prefill_points, decode_points = points[:3], points[3:]
    assert prefill_points == sorted(prefill_points)
    assert decode_points == sorted(decode_points)
    stats = timeline.transfer
    assert stats.num_blocks == 10
    assert stats.num_bytes == stats.num_blocks * 32
    assert stats.num_reads >= 1
    assert 0 <= stats.exposed_seconds <= 1


async def test_decode_skips_blocks_it_holds(pair, hand_off, expected):
    prefill, _, on_prefill, on_decode = pair
    for name in ("a", "b"):
        await hand_off(name, PROMPT, prefill, on_prefill, on_decode, max_tokens=5)
        await on_decode.ended(name)
    end = await on_decode.ended("b")
    assert end.timeline.transfer.num_blocks == 1
    assert end.num_cached_tokens == 36
    assert on_prefill.tokens("b") + on_decode.tokens("b") == expected(PROMPT, 5)


@pytest.mark.parametrize("order", ["decode-first", "prefill-first"])
async def test_halves_may_come_in_any_order(pair, make_request, expected, order):
    prefill, decode, on_prefill, on_decode = pair
    halves = [
        (on_decode, make_request("a", PROMPT, work=Work.DECODE, peer=prefill.peer, max_tokens=5)),
        (on_prefill, make_request("a", PROMPT, work=Work.PREFILL, max_tokens=5)),
    ]
    for router, request in halves if order == "decode-first" else halves[::-1]:
        await router.submit(request)
        await asyncio.sleep(0.1)
    await on_decode.ended("a")
    assert on_prefill.tokens("a") + on_decode.tokens("a") == expected(PROMPT, 5)
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


async def test_request_that_ends_with_its_first_token_ends_on_both(pair, hand_off, expected):
    prefill, decode, on_prefill, on_decode = pair
    await hand_off("a", PROMPT, prefill, on_prefill, on_decode, max_tokens=1)
    assert (await on_prefill.ended("a")).finish_reason is FinishReason.LENGTH
    end = await on_decode.ended("a")
    assert (end.finish_reason, end.first_index) == (FinishReason.LENGTH, 1)
    assert not on_decode.tokens("a")
    stop = expected(PROMPT, 1)[0]
    await hand_off("b", PROMPT, prefill, on_prefill, on_decode, eos_token_ids=(stop,))
    end = await on_decode.ended("b")
    assert (end.finish_reason, end.stop_token_id) == (FinishReason.STOP, stop)
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


async def test_replayed_request_is_handed_off_with_its_output(pair, hand_off, expected):
    prefill, _, on_prefill, on_decode = pair
    whole = expected(PROMPT, 20)
    await hand_off(
        "a", PROMPT, prefill, on_prefill, on_decode,
        max_tokens=20, output_token_ids=tuple(whole[:7]),
    )  # fmt: skip
    await on_decode.ended("a")
    assert on_prefill.deltas["a"][0].first_index == 7
    assert on_prefill.tokens("a") + on_decode.tokens("a") == whole[7:]


async def test_uncached_requests_are_handed_off_too(workers, hand_off, expected):
    prefill = await workers.start(Role.PREFILL, enable_prefix_caching=False)
    decode = await workers.start(Role.DECODE, enable_prefix_caching=False)
    on_prefill, on_decode = await prefill.router(), await decode.router()
    for name in ("a", "b"):
        await hand_off(name, PROMPT, prefill, on_prefill, on_decode, max_tokens=5, is_cached=False)
        await on_decode.ended(name)
        assert on_prefill.tokens(name) + on_decode.tokens(name) == expected(PROMPT, 5)
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


@pytest.mark.parametrize("delay_s", [0.0, 0.005, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("sides", ["both", "decode", "prefill"])
async def test_cancel_at_any_time_leaves_nothing(
    workers, hand_off, make_request, expected, delay_s, sides, depth
):
    prefill = await workers.start(Role.PREFILL, step_s=0.01, lease_s=1.0, max_in_flight=depth)
    decode = await workers.start(Role.DECODE, step_s=0.01, max_in_flight=depth)
    on_prefill, on_decode = await prefill.router(), await decode.router()
    await hand_off("a", PROMPT, prefill, on_prefill, on_decode, max_tokens=1000)
    await asyncio.sleep(delay_s)
    if sides != "decode":
        await on_prefill.cancel("a")
    if sides != "prefill":
        await on_decode.cancel("a")
        assert (await on_decode.ended("a")).finish_reason is FinishReason.CANCELLED
    else:
        # Either the hand-off was over already, or it failed with an error worth a retry.
        await asyncio.sleep(0.3)
        if on_decode.ends("a"):
            end = await on_decode.ended("a")
            assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
        await on_decode.cancel("a")
    await on_prefill.ended("a")
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()
    await hand_off("b", PROMPT, prefill, on_prefill, on_decode, max_tokens=5)
    await on_decode.ended("b")
    assert on_prefill.tokens("b") + on_decode.tokens("b") == expected(PROMPT, 5)


async def test_cancel_while_waiting_for_blocks(workers, make_request):
    prefill = await workers.start(Role.PREFILL)
    decode = await workers.start(Role.DECODE, num_blocks=16, step_s=0.01)
    on_decode = await decode.router()
    await on_decode.submit(make_request("running", PROMPT, max_tokens=2000))
    await asyncio.sleep(0.05)
    await on_decode.submit(
        make_request("a", PROMPT, work=Work.DECODE, peer=prefill.peer, is_cached=False)
    )
    await asyncio.sleep(0.05)
    await on_decode.cancel("a")
    assert (await on_decode.ended("a")).finish_reason is FinishReason.CANCELLED
    await on_decode.cancel("running")
    await decode.assert_nothing_leaked()


async def test_lease_is_kept_while_decode_waits_longer_than_it_for_blocks(
    workers, hand_off, make_request, expected
):
    lease_s = 0.9
    prefill = await workers.start(Role.PREFILL, lease_s=lease_s)
    decode = await workers.start(Role.DECODE, num_blocks=16, step_s=0.1)
    on_prefill, on_decode = await prefill.router(), await decode.router()
    await on_decode.submit(make_request("running", PROMPT, max_tokens=24, is_cached=False))
    await asyncio.sleep(0.05)
    await hand_off("a", PROMPT, prefill, on_prefill, on_decode, max_tokens=4, is_cached=False)
    await on_prefill.ended("a")
    prefilled_s = time.monotonic()
    await on_decode.ended("running")
    assert time.monotonic() - prefilled_s > 1.5 * lease_s
    assert (await on_decode.ended("a")).finish_reason is FinishReason.LENGTH
    assert on_prefill.tokens("a") + on_decode.tokens("a") == expected(PROMPT, 4)
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


async def test_defect_at_the_start_of_a_read_is_a_retryable_error(
    pair, hand_off, monkeypatch, caplog
):
    prefill, decode, on_prefill, on_decode = pair

    def defect(*args, **kwargs):
        raise ZeroDivisionError("defect")

    monkeypatch.setattr(decode.server.parts.reads._fetcher, "expect", defect)
    await hand_off("a", PROMPT, prefill, on_prefill, on_decode, max_tokens=4)
    end = await on_decode.ended("a")
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    assert "could not start" in caplog.text
    await on_prefill.cancel("a")
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


@pytest.mark.parametrize("side", ["prefill", "decode", "both"])
async def test_lost_router_leaves_nothing(workers, hand_off, side):
    prefill = await workers.start(Role.PREFILL, step_s=0.01, lease_s=1.0)
    decode = await workers.start(Role.DECODE, step_s=0.01)
    on_prefill, on_decode = await prefill.router(), await decode.router()
    for number in range(5):
        prompt = [(number * 7 + i) % 97 for i in range(30)]
        await hand_off(f"r{number}", prompt, prefill, on_prefill, on_decode, max_tokens=2000)
    await asyncio.sleep(0.08)
    if side != "decode":
        await on_prefill.close()
    if side != "prefill":
        await on_decode.close()
    else:
        await asyncio.sleep(0.3)
        for number in range(5):
            await on_decode.cancel(f"r{number}")
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


async def test_lost_prefill_worker_is_a_quick_retryable_error(workers, hand_off):
    prefill = await workers.start(Role.PREFILL, step_s=0.05)
    decode = await workers.start(Role.DECODE)
    on_prefill, on_decode = await prefill.router(), await decode.router()
    await hand_off("a", PROMPT, prefill, on_prefill, on_decode, max_tokens=5)
    await asyncio.sleep(0.08)
    stopping = asyncio.create_task(prefill.server.stop(drain_s=0))
    end = await on_decode.ended("a", timeout_s=5)
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    assert prefill.peer.worker_id in end.error
    await stopping
    await decode.assert_nothing_leaked()


async def test_unreachable_prefill_worker_is_a_quick_retryable_error(workers, make_request):
    decode = await workers.start(Role.DECODE)
    router = await decode.router()
    peer = PeerRef(WorkerId("gone"), Epoch("e"), "127.0.0.1:1")
    await router.submit(make_request("a", PROMPT, work=Work.DECODE, peer=peer))
    end = await router.ended("a", timeout_s=4)
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    assert "gone" in end.error and "unreachable" in end.error
    await decode.assert_nothing_leaked()


async def test_restarted_prefill_worker_is_not_taken_for_the_old_one(workers, make_request):
    prefill = await workers.start(Role.PREFILL)
    decode = await workers.start(Role.DECODE)
    router = await decode.router()
    stale = PeerRef(prefill.info.worker_id, Epoch("before"), prefill.info.address)
    await router.submit(make_request("a", PROMPT, work=Work.DECODE, peer=stale))
    end = await router.ended("a")
    assert end.is_retryable and "restarted" in end.error
    await decode.assert_nothing_leaked()


@pytest.mark.parametrize(
    ("difference", "reason"),
    [({"model_id": "other"}, "model_id"), ({"secret": "f" * 16}, "signature")],
)
async def test_peer_that_does_not_fit_is_refused_with_a_reason(
    workers, make_request, difference, reason
):
    prefill = await workers.start(Role.PREFILL, **difference)
    decode = await workers.start(Role.DECODE)
    router = await decode.router()
    request = make_request("a", PROMPT, work=Work.DECODE, peer=prefill.peer)
    await router.submit(request)
    end = await router.ended("a")
    assert end.is_retryable and reason in end.error
    await decode.assert_nothing_leaked()


async def test_new_link_follows_a_failed_one(workers, hand_off, make_request, expected):
    decode = await workers.start(Role.DECODE)
    on_decode = await decode.router()
    for number in range(3):
        prefill = await workers.start(Role.PREFILL)
        on_prefill = await prefill.router()
        name = f"r{number}"
        await hand_off(name, PROMPT, prefill, on_prefill, on_decode, max_tokens=5)
        await on_decode.ended(name)
        assert on_prefill.tokens(name) + on_decode.tokens(name) == expected(PROMPT, 5)
        await prefill.server.stop(drain_s=0)


async def test_lease_without_a_reader_expires(workers, make_request):
    prefill = await workers.start(Role.PREFILL, lease_s=0.5)
    router = await prefill.router()
    await router.submit(make_request("a", PROMPT, work=Work.PREFILL, max_tokens=5))
    await router.ended("a")
    assert prefill.server.parts.leases.num_leases == 1
    await prefill.assert_nothing_leaked(timeout_s=3)


async def test_cancel_after_the_first_token_ends_the_lease_at_once(workers, make_request):
    prefill = await workers.start(Role.PREFILL, lease_s=60)
    router = await prefill.router()
    await router.submit(make_request("a", PROMPT, work=Work.PREFILL, max_tokens=5))
    await router.ended("a")
    await router.cancel("a")
    await prefill.assert_nothing_leaked(timeout_s=2)


async def test_deadline_of_a_decode_that_never_gets_its_kv(workers, make_request):
    prefill = await workers.start(Role.PREFILL)
    decode = await workers.start(Role.DECODE)
    router = await decode.router()
    request = make_request("a", PROMPT, work=Work.DECODE, peer=prefill.peer, deadline_s=0.4)
    await router.submit(request)
    end = await router.ended("a")
    assert end.finish_reason is FinishReason.ERROR
    await decode.assert_nothing_leaked()
    await prefill.assert_nothing_leaked()


async def test_many_mixed_requests_with_random_cancels_leave_nothing(
    workers, hand_off, make_request, expected
):
    prefill = await workers.start(Role.PREFILL, num_blocks=48, max_num_seqs=4, step_s=0.001)
    decode = await workers.start(Role.DECODE, num_blocks=48, max_num_seqs=8, step_s=0.002)
    on_prefill, on_decode = await prefill.router(), await decode.router()
    rng = random.Random(7)
    slots = asyncio.Semaphore(16)
    outcomes: list[str] = []

    async def one(number: int) -> None:
        name, kind = f"r{number}", rng.choice(["hand-off", "hand-off", "local"])
        prompt = [rng.randrange(8) for _ in range(rng.randrange(1, 60))]
        max_tokens = rng.randrange(1, 30)
        cancel_s = rng.choice([None, rng.uniform(0, 0.1)])
        async with slots:
            if kind == "local":
                await on_decode.submit(make_request(name, prompt, max_tokens=max_tokens))
            else:
                await hand_off(name, prompt, prefill, on_prefill, on_decode, max_tokens=max_tokens)
            if cancel_s is not None:
                await asyncio.sleep(cancel_s)
                if kind != "local":
                    await on_prefill.cancel(name)
                await on_decode.cancel(name)
            end = await on_decode.ended(name, timeout_s=30)
        tokens = on_decode.tokens(name)
        if kind != "local":
            tokens = on_prefill.tokens(name)[:1] + tokens
        whole = expected(prompt, max_tokens)
        assert tokens == whole[: len(tokens)]
        if end.finish_reason is FinishReason.LENGTH:
            assert tokens == whole
        else:
            assert cancel_s is not None, end
        outcomes.append(end.finish_reason.value)

    await asyncio.gather(*(one(number) for number in range(200)))
    assert outcomes.count("length") >= 40
    assert outcomes.count("cancelled") >= 20
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()
