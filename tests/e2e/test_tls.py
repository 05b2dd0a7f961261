"""`baton serve` with certificates: the same answers, and nobody else gets in."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from baton.cli.certs import tls_config, write_certificates
from baton.core.tls import TlsFiles
from baton.rpc.v1 import worker_pb2, worker_pb2_grpc
from completions import complete
from running_system import RunningSystem

pytestmark = [pytest.mark.model, pytest.mark.slow]

WAIT_S = 60.0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls") / "ours"
    write_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def secure(
    make_system: Callable[..., RunningSystem], exact_arguments: list[str], certificates: Path
) -> Iterator[RunningSystem]:
    system = make_system("--no-ray", *exact_arguments, "--tls-dir", str(certificates))
    system.tls = TlsFiles(tls_config(certificates, "router"))
    system.start()
    yield system
    system.kill()


def wait_for_line(file: Path, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in file.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in:\n{file.read_text()[-3000:]}"
        time.sleep(0.1)


def test_hand_over_under_tls_changes_no_token(secure: RunningSystem, system: RunningSystem) -> None:
    assert complete(secure) == complete(system)
    secure.assert_nothing_leaked()


def test_replicas_under_ray_speak_tls_too(
    make_system: Callable[..., RunningSystem],
    exact_arguments: list[str],
    certificates: Path,
    system: RunningSystem,
) -> None:
    secure = make_system("--ray", *exact_arguments, "--tls-dir", str(certificates))
    secure.tls = TlsFiles(tls_config(certificates, "router"))
    secure.start()
    try:
        assert complete(secure) == complete(system)
        secure.assert_nothing_leaked()
    finally:
        secure.kill()


def test_workers_answer_nobody_without_a_certificate(secure: RunningSystem) -> None:
    for address in secure.worker_addresses():
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            worker_pb2_grpc.WorkerStub(channel).GetInfo(worker_pb2.GetInfoRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_worker_of_another_ca_gets_no_work(
    secure: RunningSystem, smollm2_float32_dir: Path, tmp_path: Path
) -> None:
    write_certificates(tmp_path / "theirs")
    foreign = tls_config(tmp_path / "theirs", "worker")
    command = [
        *(sys.executable, "-m", "services.decode", "--model", str(smollm2_float32_dir)),
        *("--registry", str(secure.run_dir / "registry"), "--set", "worker_id=foreign"),
        *("--set", "engine.dtype=float32", "--set", "engine.num_threads=1"),
        *("--set", "engine.kv_cache_bytes=30000000"),
        *(a for name, path in foreign.files() for a in ("--set", f"tls.{name}={path}")),
    ]
    log = tmp_path / "foreign.log"
    expected = complete(secure)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for_line(log, "ready at")
        reason = "its certificate was refused: it is not of the CA in tls.ca_file"
        wait_for_line(secure.run_dir / "logs" / "router.log", reason)
        wait_for_line(log, "connections so far ended without a call")
        assert complete(secure) == expected
    finally:
        process.terminate()
        process.wait(20)


def test_certificates_are_renewed_under_a_running_system(
    secure: RunningSystem, certificates: Path
) -> None:
    expected = complete(secure)
    before = (certificates / "worker.pem").read_bytes()
    write_certificates(certificates, is_renewal=True)
    assert (certificates / "worker.pem").read_bytes() != before
    assert all(worker.info.epoch for worker in secure.workers())
    assert complete(secure) == expected


def test_missing_certificates_end_the_command_at_once(
    make_system: Callable[..., RunningSystem], tmp_path: Path
) -> None:
    system = make_system("--no-ray", "--tls-dir", str(tmp_path))
    system.launch()
    assert system.process is not None
    assert system.process.wait(60) == 2
    assert "tls.ca_file" in system.output and "`baton certs DIR` makes" in system.output
