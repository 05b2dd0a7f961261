"""A worker goes over to the other pool: over gRPC, with routers connected, the real registry."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from baton.core.clock import MonotonicClock
from baton.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RoleChangeOvertaken,
    RoleChangeRefused,
)
from baton.core.request import FinishReason, Work
from baton.core.worker_info import Role
from baton.registry.directory import DirectoryRegistry
from baton.rpc.convert import request_to_wire
from baton.rpc.role_change import change_role
from baton.rpc.v1 import worker_pb2 as pb

PROMPT = tuple(range(1, 23))
P, D = Role.PREFILL, Role.DECODE


async def pool(workers, role=D, number=2, **options):
    return [await workers.start(role, registry=True, **options) for _ in range(number)]


async def test_role_limits_registry_and_routers_change_together(workers, wait_for, tmp_path):
    worker, _ = await pool(workers, other={"max_num_seqs": 2, "max_num_batched_tokens": 64})
    router, second = await worker.router("r1"), await worker.router("r2")
    before = worker.info
    info = await change_role(worker.info.address, P, timeout_s=5)
    after = dataclasses.replace(before, role=P, role_version=2, max_num_seqs=2)
    assert info == after and worker.info == after
    await wait_for(lambda: router.info == after and second.info == after)
    await wait_for(lambda: not router.load.is_draining)
    registry = DirectoryRegistry(tmp_path / "registry", clock=MonotonicClock())
    assert after in [entry.info for entry in registry.entries()]
    limits = worker.engine._scheduler._limits
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (2, 64)
    assert (await worker.router("late")).info == after
    back = await change_role(worker.info.address, D, timeout_s=5, may_empty_pool=True)
    assert back == dataclasses.replace(before, role_version=3)
    # The engine's thread takes them up before anything that is submitted from now on.
    await wait_for(lambda: worker.engine._scheduler._limits.max_num_seqs == 4)


async def test_cached_blocks_stay_and_are_told(workers, make_request, expected):
    worker, _ = await pool(workers)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=3))
    await router.ended("a")
    held, sequence = set(router.hashes), router.kv_sequence
    assert held
    await change_role(worker.info.address, P, timeout_s=5)
    assert (router.hashes, router.kv_sequence) == (held, sequence)
    await router.submit(make_request("b", PROMPT, max_tokens=3))
    assert (await router.ended("b")).num_cached_tokens == 20
    assert router.tokens("b") == expected(PROMPT, 3)
    await worker.assert_nothing_leaked()


async def test_what_runs_ends_here_and_what_waits_goes_back(workers, make_request, expected):
    worker, _ = await pool(workers, step_s=0.01, max_num_seqs=2)
    router = await worker.router()
    for number in range(5):
        await router.submit(make_request(f"r{number}", PROMPT, max_tokens=30, is_cached=False))
    await asyncio.sleep(0.08)
    await change_role(worker.info.address, P, timeout_s=10)
    ends = [await router.ended(f"r{number}") for number in range(5)]
    assert [e.finish_reason for e in ends[:2]] == [FinishReason.LENGTH] * 2
    assert router.tokens("r0") == expected(PROMPT, 30)
    for end in ends[2:]:
        assert (end.is_retryable, end.is_handed_back) == (True, True), end
    await worker.assert_nothing_leaked()


async def test_work_that_comes_meanwhile_or_for_the_old_role_goes_back(
    workers, make_request, wait_for
):
    worker, _ = await pool(workers, step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("old", PROMPT, max_tokens=150))
    await asyncio.sleep(0.05)
    changing = asyncio.create_task(change_role(worker.info.address, P, timeout_s=10))
    await wait_for(lambda: router.load.is_draining)
    await router.submit(make_request("meanwhile", PROMPT, max_tokens=2))
    assert (await router.ended("meanwhile")).is_handed_back
    await changing
    assert (await router.ended("old")).finish_reason is FinishReason.LENGTH
    stale = request_to_wire(make_request("stale", PROMPT, max_tokens=2))
    stale.role_version = 1
    await router.submit_wire(stale)
    end = await router.ended("stale")
    assert end.is_handed_back and "version 1" in end.error
    for name, version in (("current", 2), ("silent", 0)):
        message = request_to_wire(make_request(name, PROMPT, max_tokens=2))
        message.role_version = version
        await router.submit_wire(message)
        assert (await router.ended(name)).finish_reason is FinishReason.LENGTH


async def test_leases_outlive_the_change_and_can_be_read(workers, make_request, expected):
    owner, _ = await pool(workers, P)
    reader = await workers.start(D, registry=True)
    at_owner, at_reader = await owner.router(), await reader.router()
    await at_owner.submit(make_request("a", PROMPT, work=Work.PREFILL, max_tokens=6))
    await at_owner.ended("a")
    await change_role(owner.info.address, D, timeout_s=5)
    assert at_owner.load.leases
    await at_reader.submit(
        make_request("a", PROMPT, work=Work.DECODE, peer=owner.peer, max_tokens=6)
    )
    assert (await at_reader.ended("a")).finish_reason is FinishReason.LENGTH
    assert at_owner.tokens("a") + at_reader.tokens("a") == expected(PROMPT, 6)
    await owner.assert_nothing_leaked()
    await reader.assert_nothing_leaked()


async def test_a_reservation_that_gets_no_kv_goes_back(workers, make_request):
    worker, _ = await pool(workers)
    owner = await workers.start(P)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, work=Work.DECODE, peer=owner.peer, max_tokens=6))
    await asyncio.sleep(0.2)
    await change_role(worker.info.address, P, timeout_s=8)
    assert (await router.ended("a")).is_handed_back
    await worker.assert_nothing_leaked()


async def test_a_late_change_ends_nothing(workers, make_request, wait_for, expected, tmp_path):
    worker, _ = await pool(workers, step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=100))
    await asyncio.sleep(0.05)
    with pytest.raises(DeadlineExceeded, match="1 requests still ran"):
        await change_role(worker.info.address, P, timeout_s=0.3)
    assert (worker.info.role, worker.info.role_version) == (D, 1)
    await wait_for(lambda: not router.load.is_draining)
    await router.submit(make_request("b", PROMPT, max_tokens=2))
    assert (await router.ended("b")).finish_reason is FinishReason.LENGTH
    assert (await router.ended("a")).finish_reason is FinishReason.LENGTH
    assert router.tokens("a") == expected(PROMPT, 100)
    registry = DirectoryRegistry(tmp_path / "registry", clock=MonotonicClock())
    assert worker.info in [entry.info for entry in registry.entries()]
    await worker.assert_nothing_leaked()


async def test_the_last_worker_of_a_pool_stays_unless_it_is_let_go(workers):
    (worker,) = await pool(workers, number=1)
    await workers.start(P, registry=True)
    with pytest.raises(RoleChangeRefused, match="last decode worker"):
        await change_role(worker.info.address, P, timeout_s=5)
    assert worker.info.role is D
    assert (await change_role(worker.info.address, P, may_empty_pool=True)).role is P


async def test_two_that_leave_together_do_not_empty_the_pool(workers):
    pair = await pool(workers)
    asked = (change_role(w.info.address, P, timeout_s=5) for w in pair)
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(end, RoleChangeRefused) for end in ends) >= 1
    assert [w.info.role for w in pair].count(D) >= 1


async def test_a_worker_that_drains_does_not_count(workers):
    worker, other = await pool(workers)
    await other.stub.Drain(pb.DrainRequest(timeout_ms=1000))
    with pytest.raises(RoleChangeRefused, match="1 others are registered"):
        await change_role(worker.info.address, P, timeout_s=5)


async def test_without_a_registry_nobody_can_tell_who_is_left(workers):
    worker = await workers.start(D)
    with pytest.raises(RoleChangeRefused, match="may-empty-pool"):
        await change_role(worker.info.address, P, timeout_s=5)
    assert (await change_role(worker.info.address, P, may_empty_pool=True)).role is P


async def test_two_changes_at_once(workers, make_request, wait_for):
    worker, _ = await pool(workers, step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=150))
    await asyncio.sleep(0.05)
    first = asyncio.create_task(change_role(worker.info.address, P, timeout_s=10))
    await wait_for(lambda: router.load.is_draining)
    second = asyncio.create_task(change_role(worker.info.address, P, timeout_s=10))
    with pytest.raises(RoleChangeRefused, match="becoming a prefill worker"):
        await change_role(worker.info.address, D, timeout_s=10)
    assert await first == await second
    assert worker.info.role_version == 2


async def test_a_change_goes_on_when_its_asker_has_gone(workers, make_request, wait_for):
    worker, _ = await pool(workers, step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=150))
    await asyncio.sleep(0.05)
    asking = asyncio.create_task(change_role(worker.info.address, P, timeout_s=10))
    await wait_for(lambda: router.load.is_draining)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await wait_for(lambda: worker.info.role is P)


async def test_a_drain_overtakes_a_change_and_none_begins_after_it(workers, make_request, wait_for):
    worker, _ = await pool(workers, step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=150))
    await asyncio.sleep(0.05)
    changing = asyncio.create_task(change_role(worker.info.address, P, timeout_s=10))
    await wait_for(lambda: router.load.is_draining)
    reply = await worker.stub.Drain(pb.DrainRequest(timeout_ms=10_000))
    assert reply.num_ended == 0
    with pytest.raises(RoleChangeOvertaken):
        await changing
    with pytest.raises(RoleChangeOvertaken, match="start another"):
        await change_role(worker.info.address, P, timeout_s=5)
    assert worker.info.role is D
    assert (await router.ended("a")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()


async def test_a_worker_that_stops_meanwhile_leaves_no_registration(
    workers, make_request, wait_for, tmp_path
):
    worker, other = await pool(workers, step_s=0.01)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=500))
    await asyncio.sleep(0.05)
    changing = asyncio.create_task(change_role(worker.info.address, P, timeout_s=10))
    await wait_for(lambda: router.load.is_draining)
    await worker.server.stop(drain_s=0.1)
    (end,) = await asyncio.gather(changing, return_exceptions=True)
    assert isinstance(end, Exception)
    registry = DirectoryRegistry(tmp_path / "registry", clock=MonotonicClock())
    assert list(await registry.list()) == [other.info.worker_id]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"tp_size": 2}, "engine.tp_size is 1 here and 2"),
        ({"kv_cache_bytes": 1 << 20}, "engine.kv_cache_bytes is None here"),
        ({"block_size": 8}, "engine.block_size is 4 here"),
    ],
)
async def test_what_needs_a_restart_is_refused_with_its_name(workers, other, words):
    worker, _ = await pool(workers, other=other)
    with pytest.raises(RoleChangeRefused, match=words):
        await change_role(worker.info.address, P, timeout_s=5)
    assert worker.info.role_version == 1


async def test_a_worker_whose_role_is_counted_elsewhere_says_so(workers):
    worker = await workers.start(D, fixed_role="Ray Serve counts it")
    with pytest.raises(RoleChangeRefused, match="Ray Serve counts it"):
        await change_role(worker.info.address, P, timeout_s=5, may_empty_pool=True)
    assert (await change_role(worker.info.address, D, timeout_s=5)).role is D


async def test_bad_requests_are_told_what_is_wrong(workers):
    worker = await workers.start(D)
    for request, words in (
        (pb.ChangeRoleRequest(role=pb.ROLE_UNSPECIFIED, timeout_ms=1000), "role 0 is unknown"),
        (pb.ChangeRoleRequest(role=pb.ROLE_PREFILL), "from 1 ms to 3600 s, got 0 s"),
    ):
        with pytest.raises(Exception, match=words) as raised:
            await worker.stub.ChangeRole(request)
        assert raised.value.code().name == "INVALID_ARGUMENT"
    with pytest.raises(InvalidRequest, match="3600"):
        await change_role(worker.info.address, P, timeout_s=4000, may_empty_pool=True)


async def test_an_engine_in_a_long_step_does_not_hold_the_answer_back(workers, make_request):
    worker, _ = await pool(workers)
    router = await worker.router()
    worker.runner.step_s = 1.8
    await router.submit(make_request("a", PROMPT, max_tokens=2))
    await asyncio.sleep(0.1)
    with pytest.raises(DeadlineExceeded, match="1 requests still ran"):
        await change_role(worker.info.address, P, timeout_s=0.4)
    assert not router.ends("a")
    worker.runner.step_s = 0.0
    assert (await router.ended("a")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()
