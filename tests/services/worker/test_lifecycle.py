import asyncio
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.core.clock import MonotonicClock
from baton.core.errors import ConfigError
from baton.core.request import FinishReason, Work
from baton.core.worker_info import Role
from baton.engine.config import EngineConfig
from baton.engine.tensor_parallel.group import RankGroup
from baton.registry.directory import DirectoryRegistry
from baton.rpc.v1 import worker_pb2 as pb
from services.worker.worker import WorkerServer

PROMPT = tuple(range(1, 23))
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_drain_waits_for_running_requests_and_refuses_new_ones(
    workers, make_request, wait_for, max_in_flight
):
    worker = await workers.start(step_s=0.01, max_in_flight=max_in_flight)
    router = await worker.router()
    await router.submit(make_request("old", PROMPT, max_tokens=30))
    await asyncio.sleep(0.05)
    draining = asyncio.ensure_future(worker.stub.Drain(pb.DrainRequest(timeout_ms=10_000)))
    await wait_for(lambda: router.load.is_draining)
    await router.submit(make_request("new", PROMPT, max_tokens=3))
    refused = await router.ended("new")
    assert (refused.finish_reason, refused.is_retryable) == (FinishReason.ERROR, True)
    assert "draining" in refused.error
    assert not router.ends("old")
    reply = await draining
    assert reply.num_ended == 0
    assert (await router.ended("old")).finish_reason is FinishReason.LENGTH
    await worker.assert_nothing_leaked()


async def test_drain_waits_for_leases(workers, make_request):
    worker = await workers.start(Role.PREFILL, lease_s=0.6)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, work=Work.PREFILL, max_tokens=3))
    await router.ended("a")
    started_s = time.monotonic()
    await worker.stub.Drain(pb.DrainRequest(timeout_ms=10_000))
    assert 0.3 < time.monotonic() - started_s < 5
    await worker.assert_nothing_leaked()


async def test_drain_ends_what_is_left_when_its_time_is_up(workers, make_request):
    worker = await workers.start(step_s=0.01)
    router = await worker.router()
    for number in range(3):
        await router.submit(make_request(f"r{number}", PROMPT, max_tokens=2000))
    await asyncio.sleep(0.05)
    reply = await worker.stub.Drain(pb.DrainRequest(timeout_ms=200))
    assert reply.num_ended == 3
    for number in range(3):
        end = await router.ended(f"r{number}")
        assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    await worker.assert_nothing_leaked()


async def test_stop_ends_sessions_and_is_quick_when_idle(workers, make_request):
    worker = await workers.start()
    router = await worker.router()
    started_s = time.monotonic()
    await worker.server.stop()
    assert time.monotonic() - started_s < 1.5
    assert await router.call.code() is grpc.StatusCode.UNAVAILABLE
    await worker.server.stop()
    assert not (await worker.server.check_health()).is_healthy


async def test_two_workers_reading_from_each_other_stop_cleanly(workers, make_request):
    first = await workers.start(Role.PREFILL)
    second = await workers.start(Role.DECODE)
    for reader, owner in ((first, second), (second, first)):
        on_reader, on_owner = await reader.router(), await owner.router()
        name = f"to-{reader.info.worker_id}"
        await on_reader.submit(
            make_request(name, PROMPT, work=Work.DECODE, peer=owner.peer, max_tokens=4)
        )
        await on_owner.submit(make_request(name, PROMPT, work=Work.PREFILL, max_tokens=4))
        assert (await on_reader.ended(name)).finish_reason is FinishReason.LENGTH
    await first.assert_nothing_leaked()
    await second.assert_nothing_leaked()


async def test_worker_is_in_the_registry_while_it_serves(workers, tmp_path):
    worker = await workers.start(registry=True)
    registry = DirectoryRegistry(tmp_path / "registry", clock=MonotonicClock())
    await asyncio.sleep(0.1)
    assert await registry.list() == {worker.info.worker_id: worker.info}
    await asyncio.sleep(2.2)
    assert await registry.list() == {worker.info.worker_id: worker.info}
    await worker.server.stop(drain_s=0)
    assert not await registry.list()


async def test_health_is_served_for_every_service_and_turns_when_the_engine_hangs(
    workers, make_request
):
    worker = await workers.start()
    stub = health_pb2_grpc.HealthStub(worker.channel)

    async def status(service: str) -> int:
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return reply.status

    await asyncio.sleep(0.05)
    for service in ("", "baton.v1.Worker", "baton.v1.Transfer"):
        assert await status(service) == SERVING
    assert (await worker.server.check_health()).is_healthy
    worker.runner.step_s = 3.5
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=1))
    async with asyncio.timeout(3.4):
        while await status("") == SERVING:
            await asyncio.sleep(0.05)
    assert not (await worker.server.check_health()).is_healthy
    worker.runner.step_s = 0
    async with asyncio.timeout(5):
        while await status("baton.v1.Worker") != SERVING:
            await asyncio.sleep(0.05)
    await router.ended("a")


async def test_worker_whose_steps_all_fail_tells_the_routers_and_has_failed(
    workers, make_request, wait_for, monkeypatch
):
    worker = await workers.start()
    router = await worker.router()

    def fail(batch):
        raise RuntimeError("device lost")

    monkeypatch.setattr(worker.runner, "launch", fail)
    for number in range(4):
        await router.submit(make_request(f"r{number}", PROMPT, max_tokens=3))
        end = await router.ended(f"r{number}")
        assert (end.finish_reason, end.is_retryable) == (FinishReason.ERROR, True)
    await wait_for(lambda: router.load.is_unhealthy)
    await asyncio.wait_for(worker.server.failed(), 5)
    assert not (await worker.server.check_health()).is_healthy
    late = await worker.router("late")
    assert late.load.is_unhealthy


async def test_worker_that_loses_a_rank_tells_the_routers_and_has_failed(
    workers, wait_for, tmp_path
):
    # Of a group without processes: it is lost when it is told so.
    ranks = RankGroup(EngineConfig(model_path=tmp_path, tp_size=2))
    worker = await workers.start(ranks=ranks)
    router = await worker.router()
    assert (await worker.server.check_health()).is_healthy
    # Found by a thread of the group's own.
    await asyncio.to_thread(ranks.fail, "rank 1 of 2 (process 7) was killed by SIGKILL")
    await asyncio.wait_for(worker.server.failed(), 5)
    await wait_for(lambda: router.load.is_unhealthy)
    verdict = await worker.server.check_health()
    assert not verdict.is_healthy
    assert verdict.reason.endswith("rank 1 of 2 (process 7) was killed by SIGKILL")
    await worker.server.stop(drain_s=0)


async def test_rank_lost_before_the_worker_listens_is_not_missed(workers, tmp_path):
    ranks = RankGroup(EngineConfig(model_path=tmp_path, tp_size=2))
    ranks.fail("rank 1 of 2 left")
    worker = await workers.start(ranks=ranks)
    await asyncio.wait_for(worker.server.failed(), 5)
    assert "rank 1 of 2 left" in (await worker.server.check_health()).reason


async def test_dead_background_task_is_a_failed_worker_that_still_stops(
    workers, make_request, wait_for, monkeypatch, caplog
):
    worker = await workers.start(Role.PREFILL)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=3))
    await router.ended("a")
    assert not router.load.is_unhealthy

    def defect():
        raise ZeroDivisionError("defect")

    monkeypatch.setattr(worker.server.parts.leases._owner, "tick", defect)
    await asyncio.wait_for(worker.server.failed(), 5)
    await wait_for(lambda: router.load.is_unhealthy)
    verdict = await worker.server.check_health()
    assert not verdict.is_healthy and "lease clock" in verdict.reason
    await worker.server.stop(drain_s=0)
    assert not worker.server.parts.engine.is_alive
    assert "lease clock" in caplog.text


async def test_part_that_cannot_stop_does_not_keep_the_others_running(workers, monkeypatch, caplog):
    worker = await workers.start()

    async def defect():
        raise ZeroDivisionError("defect")

    monkeypatch.setattr(worker.server.parts.reads, "close", defect)
    await worker.server.stop(drain_s=0)
    assert not worker.server.parts.engine.is_alive
    assert "could not stop transfers" in caplog.text


async def test_leaving_worker_stays_not_serving(workers, make_request, wait_for):
    worker = await workers.start(step_s=0.05)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=30))
    await wait_for(lambda: router.tokens("a"))
    stub = health_pb2_grpc.HealthStub(worker.channel)
    stopping = asyncio.create_task(worker.server.stop(drain_s=5))
    # Longer than a period of the watch, which goes on while the worker drains.
    await asyncio.sleep(0.6)
    assert not stopping.done()
    reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert reply.status != SERVING
    await stopping


async def test_reflection_lists_the_services(workers):
    worker = await workers.start()
    stub = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    reply = await call.read()
    names = {service.name for service in reply.list_services_response.service}
    assert {"baton.v1.Worker", "baton.v1.Transfer", "grpc.health.v1.Health"} <= names
    await call.done_writing()
    call.cancel()


async def test_taken_port_is_a_configuration_error(workers):
    worker = await workers.start()
    port = int(worker.info.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port}"):
        await workers.start(port=port)


async def test_failed_start_leaves_nothing_running(workers):
    worker = await workers.start()

    async def no_backend(*_):
        raise ConfigError("no such model")

    config = worker.server._config
    server = WorkerServer(config, open_backend=no_backend)
    with pytest.raises(ConfigError, match="no such model"):
        await server.start()
    verdict = await server.check_health()
    assert not verdict.is_healthy


@pytest.mark.parametrize("num_mates", [0, 1])
async def test_drain_hands_back_what_waits_where_others_can_take_it(
    workers, make_request, num_mates
):
    worker = await workers.start(registry=True, step_s=0.01, max_num_seqs=1)
    for _ in range(num_mates):
        await workers.start(registry=True)
    router = await worker.router()
    for number in range(3):
        await router.submit(make_request(f"r{number}", PROMPT, max_tokens=30, is_cached=False))
    await asyncio.sleep(0.05)
    reply = await worker.stub.Drain(pb.DrainRequest(timeout_ms=20_000))
    assert reply.num_ended == 0
    ends = [await router.ended(f"r{number}") for number in range(3)]
    assert not ends[0].is_handed_back
    assert [end.is_handed_back for end in ends[1:]] == [bool(num_mates)] * 2
    await worker.assert_nothing_leaked()
