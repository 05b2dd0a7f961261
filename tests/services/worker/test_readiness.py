"""A worker is ready once it is registered and its links are warm, and says so to probes."""

import asyncio
import contextlib
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.cli import main as cli
from baton.core.request import PeerRef
from baton.core.worker_info import Epoch, Role, WorkerId
from services.worker import mesh, readiness, wanted_peers
from services.worker.readiness import READY_SERVICE, reason_not_ready

PROMPT = tuple(range(1, 23))
SERVING = health_pb2.HealthCheckResponse.SERVING
READY = {"is_healthy": True, "is_draining": False, "registered": [True], "num_untried_peers": 0}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(mesh, "TICK_S", 0.02)
    monkeypatch.setattr(wanted_peers, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(readiness, "PERIOD_S", 0.02)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """What the workers of this container were started with."""
    file = tmp_path / "worker.yaml"
    registry = {"directory": str(tmp_path / "registry")}
    file.write_text(yaml.safe_dump({"registry": registry, "drain_s": 5, "role": "decode"}))
    return file


async def command(*arguments: object, environ: dict[str, str] | None = None) -> int:
    return await asyncio.to_thread(cli.main, [str(a) for a in arguments], environ or {})


async def is_ready(worker) -> bool:
    stub = health_pb2_grpc.HealthStub(worker.channel)
    with contextlib.suppress(grpc.aio.AioRpcError):
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=READY_SERVICE))
        return reply.status == SERVING
    return False


async def becomes(worker, expected: bool) -> None:
    async with asyncio.timeout(10):
        while await is_ready(worker) is not expected:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"registered": []}, None),
        ({"is_healthy": False}, "not healthy"),
        ({"is_draining": True}, "drains"),
        ({"registered": [True, False]}, "1 of 2"),
        ({"num_untried_peers": 3}, "3 peers"),
    ],
)
def test_the_reason_names_what_is_missing(change, reason):
    found = reason_not_ready(**{**READY, **change})
    assert found == reason or (found is not None and reason is not None and reason in found)


async def test_a_worker_is_ready_once_registered_and_not_when_it_drains(workers):
    worker = await workers.start(registry=True)
    await becomes(worker, True)
    worker.server.parts.requests.start_draining()
    await becomes(worker, False)


async def test_a_listed_peer_is_tried_before_the_worker_is_ready(workers):
    reader = await workers.start(Role.DECODE)
    await becomes(reader, True)
    mesh_ = reader.server.parts.mesh
    gone = PeerRef(WorkerId("gone"), Epoch("e"), "127.0.0.1:1")
    router = await reader.router()
    await router.tell_peers(gone)
    async with asyncio.timeout(10):
        while len(mesh_.known_peers()) != 1:
            await asyncio.sleep(0.005)
    # One that cannot be reached holds nobody back.
    async with asyncio.timeout(10):
        while mesh_.num_untried():
            await asyncio.sleep(0.005)
    await becomes(reader, True)
    owner = await workers.start(Role.PREFILL)
    await router.tell_peers(owner.peer, gone)
    async with asyncio.timeout(10):
        while not mesh_.is_ready(owner.peer):
            await asyncio.sleep(0.005)
    await becomes(reader, True)


async def test_probes_find_the_workers_of_the_container(workers, settings, capsys):
    probe = ("probe", "worker")
    assert await command(*probe, "ready", "--config", settings) == 1
    assert "0 of 1 workers" in capsys.readouterr().err
    worker = await workers.start(registry=True, name="decode-a")
    await becomes(worker, True)
    for question in ("live", "ready"):
        assert await command(*probe, question, "--config", settings) == 0
    assert await command(*probe, "ready", "--config", settings, "--count", 2) == 1
    assert "1 of 2 workers" in capsys.readouterr().err
    # Where settings name a worker, another one does not answer for it.
    named = {"BATON_WORKER_ID": "decode-b"}
    assert await command(*probe, "live", "--config", settings, environ=named) == 1
    assert (
        await command(*probe, "live", "--config", settings, environ={"BATON_WORKER_ID": "decode-a"})
        == 0
    )


async def test_drain_waits_for_requests_and_leaves_the_worker_alive(
    workers, settings, make_request, capsys
):
    worker = await workers.start(registry=True, step_s=0.01)
    await becomes(worker, True)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=30))
    await asyncio.sleep(0.05)
    assert await command("drain", "--config", settings) == 0
    assert "1 workers drained, 0 requests ended" in capsys.readouterr().out
    assert (await router.ended("a")).error == ""
    await becomes(worker, False)
    assert await command("probe", "worker", "ready", "--config", settings) == 1
    assert await command("probe", "worker", "live", "--config", settings) == 0
    await worker.assert_nothing_leaked()


async def test_drain_says_when_requests_had_to_be_ended(workers, settings, make_request, capsys):
    worker = await workers.start(registry=True, step_s=0.01)
    await becomes(worker, True)
    router = await worker.router()
    await router.submit(make_request("a", PROMPT, max_tokens=2000))
    await asyncio.sleep(0.05)
    assert await command("drain", "--config", settings, "--timeout", 0.2) == 1
    assert "1 requests ended" in capsys.readouterr().out
    await worker.assert_nothing_leaked()


async def test_drain_without_workers_has_nothing_to_do(settings, capsys):
    assert await command("drain", "--config", settings) == 0
    assert "0 workers drained" in capsys.readouterr().out


async def test_a_hanging_worker_is_not_live(workers, settings, capsys):
    worker = await workers.start(registry=True)
    await becomes(worker, True)
    worker.server.parts.health.give_up("its device is lost")
    async with asyncio.timeout(10):
        while await command("probe", "worker", "live", "--config", settings) == 0:
            await asyncio.sleep(0.05)
    assert "says no" in capsys.readouterr().err


async def test_wrong_usage_is_named(settings, tmp_path, capsys):
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    for arguments, reason in (
        (("probe", "worker", "live"), "--config is missing"),
        (("probe", "worker", "live", "--config", empty), "registry.directory is not set"),
        (("probe", "worker", "live", "--config", settings, "--timeout", -1), "positive"),
        (("drain", "--config", settings, "--timeout", -1), "--timeout must be between"),
        (("drain", "--config", tmp_path / "none.yaml"), "none.yaml"),
    ):
        assert await command(*arguments) == 2
        assert reason in capsys.readouterr().err
