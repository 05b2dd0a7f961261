"""Requests whose prefix another worker caches: fetched when that pays, and never worse off."""

import asyncio

import pytest

from baton.core.lifecycle import LifecycleEvent, Timeline
from baton.core.request import FinishReason, PeerRef, Work
from baton.core.worker_info import Epoch, Role, WorkerId
from services.worker import prefix_imports

PROMPT = tuple(i % 97 for i in range(1, 82))
"""20 blocks and a token."""


def slow(worker, seconds_per_token=0.01):
    """The worker has found that it computes slowly: a fetch pays."""
    points = {LifecycleEvent.PREFILL_STARTED: 0.0, LifecycleEvent.PREFILL_ENDED: 0.0}
    points[LifecycleEvent.PREFILL_ENDED] = 1000 * seconds_per_token
    worker.server.parts.imports.computed(1000, Timeline(points))


@pytest.fixture
async def trio(workers, make_request):
    """A worker that caches PROMPT and one that does not, with a router's session to each."""
    owner, reader = await workers.start(Role.PREFILL), await workers.start(Role.PREFILL)
    on_owner, on_reader = await owner.router(), await reader.router()
    await on_owner.submit(make_request("first", PROMPT, max_tokens=8))
    await on_owner.ended("first")
    await reader.server.parts.mesh.link_to(owner.peer).ready()
    slow(reader)
    return owner, reader, on_reader


async def test_prefix_is_fetched_from_the_worker_that_caches_it(trio, make_request, expected):
    owner, reader, router = trio
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=8))
    end = await router.ended("a")
    assert end.num_cached_tokens == 80
    assert router.tokens("a") == expected(PROMPT, 8)
    await router.submit(make_request("b", PROMPT, max_tokens=8))
    assert (await router.ended("b")).num_cached_tokens == 80
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()


async def test_prefill_reads_what_decode_generated(workers, make_request, expected):
    prefill, decode = await workers.start(Role.PREFILL), await workers.start(Role.DECODE)
    on_prefill, on_decode = await prefill.router(), await decode.router()
    slow(prefill)
    await on_decode.submit(make_request("turn1", PROMPT, max_tokens=24))
    await on_decode.ended("turn1")
    answer = on_decode.tokens("turn1")
    turn2 = (*PROMPT, *answer, 5, 6, 7)
    await on_decode.submit(
        make_request("turn2", turn2, work=Work.DECODE, peer=prefill.peer, max_tokens=6)
    )
    await on_prefill.submit(
        make_request("turn2", turn2, work=Work.PREFILL, peer=decode.peer, max_tokens=6)
    )
    first = await on_prefill.ended("turn2")
    await on_decode.ended("turn2")
    assert first.num_cached_tokens == (len(PROMPT) + 23) // 4 * 4
    assert on_prefill.tokens("turn2") + on_decode.tokens("turn2") == expected(turn2, 6)
    await prefill.assert_nothing_leaked()
    await decode.assert_nothing_leaked()


async def test_what_is_cheap_to_compute_is_not_fetched(trio, make_request):
    owner, reader, router = trio
    for _ in range(60):
        slow(reader, seconds_per_token=1e-7)
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    assert (await router.ended("a")).num_cached_tokens == 0
    assert reader.server.parts.fabric.report().counters.fetched_blocks == 0


async def test_fetch_can_be_turned_off(workers, make_request):
    owner = await workers.start(Role.PREFILL)
    reader = await workers.start(Role.PREFILL, transfer={"enable_prefix_fetch": False})
    on_owner, router = await owner.router(), await reader.router()
    await on_owner.submit(make_request("first", PROMPT, max_tokens=4))
    await on_owner.ended("first")
    slow(reader)
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    assert (await router.ended("a")).num_cached_tokens == 0


async def test_part_that_the_peer_does_not_have_is_computed(trio, make_request, expected):
    owner, reader, router = trio
    longer = (*PROMPT, *range(20))
    await router.submit(make_request("a", longer, peer=owner.peer, max_tokens=4))
    end = await router.ended("a")
    assert end.num_cached_tokens == 80
    assert router.tokens("a") == expected(longer, 4)
    await reader.assert_nothing_leaked()


@pytest.mark.parametrize("trouble", ["unknown", "unreachable", "restarted", "itself"])
async def test_source_that_is_no_use_costs_only_time(trio, make_request, expected, trouble):
    owner, reader, router = trio
    peers = {
        "unknown": owner.peer,
        "unreachable": PeerRef(WorkerId("gone"), Epoch("e"), "127.0.0.1:1"),
        "restarted": PeerRef(owner.peer.worker_id, Epoch("before"), owner.peer.address),
        "itself": reader.peer,
    }
    prompt = PROMPT[1:] if trouble == "unknown" else PROMPT
    await router.submit(make_request("a", prompt, peer=peers[trouble], max_tokens=4))
    end = await router.ended("a")
    assert (end.finish_reason, end.num_cached_tokens) == (FinishReason.LENGTH, 0)
    assert router.tokens("a") == expected(prompt, 4)
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()


async def test_siblings_wait_for_one_fetch(trio, make_request, expected):
    owner, reader, router = trio
    for number in range(6):
        prompt = (*PROMPT, number)
        await router.submit(make_request(f"r{number}", prompt, peer=owner.peer, max_tokens=4))
    for number in range(6):
        end = await router.ended(f"r{number}")
        assert end.num_cached_tokens == 80
        assert router.tokens(f"r{number}") == expected((*PROMPT, number), 4)
    assert reader.server.parts.fabric.report().counters.fetched_blocks == 20
    await reader.assert_nothing_leaked()


async def test_full_pool_computes_what_it_can(workers, make_request, expected):
    owner = await workers.start(Role.PREFILL)
    reader = await workers.start(Role.PREFILL, num_blocks=28)
    on_owner, router = await owner.router(), await reader.router()
    await on_owner.submit(make_request("first", PROMPT, max_tokens=4))
    await on_owner.ended("first")
    slow(reader)
    other = tuple(90 - i for i in range(60))
    await router.submit(make_request("busy", other, max_tokens=30))
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    for name, prompt, num_tokens in (("busy", other, 30), ("a", PROMPT, 4)):
        await router.ended(name)
        assert router.tokens(name) == expected(prompt, num_tokens)
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()


class Held:
    """The owner's engine takes no question, so what a reader asks of it waits."""

    def __init__(self, owner, monkeypatch):
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        engine = owner.server.parts.engine
        ask = engine.lease_prefix

        async def lease_prefix(lease_id, hashes):
            self.asked.set()
            await self.go_on.wait()
            return await ask(lease_id, hashes)

        monkeypatch.setattr(engine, "lease_prefix", lease_prefix)


@pytest.fixture
def held(trio, monkeypatch):
    return Held(trio[0], monkeypatch)


async def wait_held(held, reader, router, wait_for):
    await asyncio.wait_for(held.asked.wait(), 5)
    assert reader.server.parts.imports.num_held == 1
    await wait_for(lambda: router.load.num_waiting == 1)
    assert router.load.queued_prefill_tokens == len(PROMPT)


async def test_cancelled_while_held(trio, held, make_request, wait_for):
    owner, reader, router = trio
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    await wait_held(held, reader, router, wait_for)
    await router.cancel("a")
    assert (await router.ended("a")).finish_reason is FinishReason.CANCELLED
    held.go_on.set()
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()
    await wait_for(lambda: router.load.num_waiting == 0)


async def test_deadline_while_held(trio, held, make_request, wait_for):
    owner, reader, router = trio
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4, deadline_s=0.1))
    end = await router.ended("a")
    assert end.finish_reason is FinishReason.ERROR and "deadline" in end.error
    held.go_on.set()
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()


async def test_router_lost_while_held(trio, held, make_request, wait_for):
    owner, reader, router = trio
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    await wait_held(held, reader, router, wait_for)
    await router.close()
    held.go_on.set()
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()


async def test_drain_lets_held_requests_finish(trio, held, make_request, wait_for, expected):
    owner, reader, router = trio
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    await wait_held(held, reader, router, wait_for)
    draining = asyncio.create_task(reader.server.parts.drain.run(timeout_s=5))
    held.go_on.set()
    assert await draining == 0
    assert router.tokens("a") == expected(PROMPT, 4)
    await reader.assert_nothing_leaked()


async def test_drain_that_times_out_ends_held_requests(
    trio, held, make_request, wait_for, monkeypatch
):
    owner, reader, router = trio
    slow(reader, 1.0)
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    await wait_held(held, reader, router, wait_for)
    assert await reader.server.parts.drain.run(timeout_s=0.05) == 1
    end = await router.ended("a")
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    held.go_on.set()
    await reader.assert_nothing_leaked()


async def test_slow_fetch_is_given_up_and_the_prompt_computed(trio, held, make_request, expected):
    owner, reader, router = trio
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    end = await router.ended("a")
    assert (end.finish_reason, end.num_cached_tokens) == (FinishReason.LENGTH, 0)
    assert router.tokens("a") == expected(PROMPT, 4)
    held.go_on.set()
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()


async def test_owner_lost_while_held(trio, held, make_request, expected):
    owner, reader, router = trio
    slow(reader, 1.0)
    await router.submit(make_request("a", PROMPT, peer=owner.peer, max_tokens=4))
    await asyncio.wait_for(held.asked.wait(), 5)
    await owner.server.stop(drain_s=0)
    end = await router.ended("a", timeout_s=5)
    assert (end.finish_reason, end.num_cached_tokens) == (FinishReason.LENGTH, 0)
    assert router.tokens("a") == expected(PROMPT, 4)
    await reader.assert_nothing_leaked()


async def test_cancelled_prefill_that_was_held_tells_its_watching_reader(
    workers, trio, held, make_request, wait_for
):
    owner, reader, router = trio
    decode = await workers.start(Role.DECODE)
    on_decode = await decode.router()
    await on_decode.submit(make_request("a", PROMPT, work=Work.DECODE, peer=reader.peer))
    await router.submit(make_request("a", PROMPT, work=Work.PREFILL, peer=owner.peer))
    await wait_held(held, reader, router, wait_for)
    await wait_for(lambda: reader.server.parts.leases._owner.num_watches == 1)
    await router.cancel("a")
    end = await on_decode.ended("a")
    assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    held.go_on.set()
    for worker in (owner, reader, decode):
        await worker.assert_nothing_leaked()


async def test_number_of_held_requests_is_bounded(trio, held, make_request, monkeypatch):
    owner, reader, router = trio
    monkeypatch.setattr(prefix_imports, "MAX_HELD", 2)
    slow(reader, 1.0)
    for number in range(4):
        await router.submit(
            make_request(f"r{number}", (*PROMPT, number), peer=owner.peer, max_tokens=2)
        )
    for number in (2, 3):
        await router.ended(f"r{number}")
    assert reader.server.parts.imports.num_held == 2
    held.go_on.set()
    for number in (0, 1):
        await router.ended(f"r{number}")
    await reader.assert_nothing_leaked()
    await owner.assert_nothing_leaked()
