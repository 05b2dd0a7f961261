"""`baton role` against a gRPC server that answers as a worker does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from baton.cli import main as cli
from baton.core.clock import MonotonicClock
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from baton.registry.directory import DirectoryRegistry
from baton.rpc.convert import role_from_wire, worker_info_to_wire
from baton.rpc.v1 import worker_pb2 as pb
from baton.rpc.v1 import worker_pb2_grpc as pb_grpc


class ScriptedWorker(pb_grpc.WorkerServicer):
    """Does what it is asked, or refuses as `refusal` says."""

    def __init__(self) -> None:
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.asked: list[pb.ChangeRoleRequest] = []
        self.address = ""

    def info(self, role: Role) -> WorkerInfo:
        return WorkerInfo(
            WorkerId("decode-0"), Epoch("e"), role, self.address, "m",
            KvLayout("m", 1, 1, 1, 4, "float32"), 8, 64, 4, "shm", os.getpid(),
        )  # fmt: skip

    def ChangeRole(
        self, request: pb.ChangeRoleRequest, context: grpc.ServicerContext
    ) -> pb.ChangeRoleResponse:
        self.asked.append(request)
        if self.refusal is not None:
            context.abort(*self.refusal)
        info = self.info(role_from_wire(request.role))
        return pb.ChangeRoleResponse(info=worker_info_to_wire(info), seconds=0.1)


@pytest.fixture
def worker() -> Iterator[ScriptedWorker]:
    servicer = ScriptedWorker()
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        pb_grpc.add_WorkerServicer_to_server(servicer, server)
        servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield servicer
        server.stop(None).wait()


@pytest.fixture
async def run_dir(worker: ScriptedWorker, tmp_path: Path) -> Path:
    """Of a system whose only worker is `worker`."""
    registry = DirectoryRegistry(tmp_path / "registry", clock=MonotonicClock())
    await registry.register(worker.info(Role.DECODE), ttl_s=60)
    return tmp_path


def role(*arguments: str) -> int:
    return cli.main(["role", *arguments], {})


def test_a_worker_is_named_by_its_address(
    worker: ScriptedWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert role(worker.address, "prefill", "--timeout", "5") == 0
    (asked,) = worker.asked
    assert (asked.role, asked.timeout_ms) == (pb.ROLE_PREFILL, 5000)
    assert not asked.may_empty_pool
    assert "decode-0 serves as a prefill worker" in capsys.readouterr().out


def test_a_worker_is_named_by_its_name(worker: ScriptedWorker, run_dir: Path) -> None:
    given = ("--run-dir", str(run_dir), "--may-empty-pool")
    assert role("decode-0", "prefill", *given) == 0
    assert worker.asked[0].may_empty_pool


def test_an_unknown_name_is_answered_with_those_there_are(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert role("decode-7", "prefill", "--run-dir", str(run_dir)) == 2
    assert "no worker decode-7 is registered; there are decode-0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED]
)
def test_a_refusal_is_told_with_its_reason(
    worker: ScriptedWorker, capsys: pytest.CaptureFixture[str], code: grpc.StatusCode
) -> None:
    worker.refusal = (code, "it is the last decode worker")
    assert role(worker.address, "prefill") == 1
    assert "stays where it is: it is the last decode worker" in capsys.readouterr().err


def test_nobody_at_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert role("127.0.0.1:1", "prefill", "--timeout", "1") == 1
    assert "stays where it is" in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "1e9"])
def test_a_timeout_that_makes_no_sense(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert role("127.0.0.1:1", "prefill", "--timeout", timeout) == 2
    assert "--timeout must be above 0" in capsys.readouterr().err
