"""`baton doctor` beside a running `baton serve`, from healthy to a worker that hangs."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.cli import main as cli
from baton.cli.certs import tls_config, write_certificates
from baton.core.tls import TlsFiles
from running_system import RunningSystem
from tiny_llama import write_checkpoint, write_pair_tokenizer

IDS = ("decode-0", "decode-1", "prefill-0")
COMMAND_TIMEOUT_S = 60.0
"""Far above what the command's own deadlines add up to."""


@pytest.fixture(scope="module")
def small_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a `baton serve` whose model and pools are tiny."""
    model = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", vocab_size=256)
    write_pair_tokenizer(model)
    small = [
        f"--set={pool}.engine.{setting}"
        for pool in ("prefill", "decode")
        for setting in ("kv_cache_bytes=4000000", "num_threads=1")
    ]
    return ["--no-ray", "--model", str(model), "--dtype", "float32", *small]


@pytest.fixture(scope="module")
def system(
    tmp_path_factory: pytest.TempPathFactory, small_arguments: list[str]
) -> Iterator[RunningSystem]:
    arguments = [*small_arguments, "--prefill", "1", "--decode", "2"]
    running = RunningSystem(arguments, tmp_path_factory.mktemp("run"))
    running.start()
    yield running
    try:
        running.interrupt(COMMAND_TIMEOUT_S)
    finally:
        running.kill()
    assert running.leftovers() == []


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "baton.cli.main", "doctor", "--rounds", "2", *arguments]


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )


def run_dir(system: RunningSystem) -> tuple[str, str]:
    return "--run-dir", str(system.run_dir)


def test_healthy_system(system: RunningSystem) -> None:
    done = doctor(*run_dir(system))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for reader, owner in itertools.permutations(IDS, 2):
        (line,) = (line for line in lines if line.startswith(f"{reader} <- {owner} "))
        assert line.split()[3] in ("nixl", "shm")
    assert lines[-1].startswith("healthy")
    system.assert_nothing_leaked()


def test_json_holds_every_worker_and_link(system: RunningSystem) -> None:
    done = doctor(*run_dir(system), "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["is_healthy"]) == (0, True)
    assert [each["info"]["worker_id"] for each in report["workers"]] == list(IDS)
    assert all(each["registration"]["epoch"] for each in report["workers"])
    assert all(each["fabric"]["counters"]["failed_reads"] == 0 for each in report["workers"])
    pairs = {(each["reader"], each["owner"]) for each in report["links"]}
    assert pairs == set(itertools.permutations(IDS, 2))
    for each in report["links"]:
        assert each["report"]["bytes_per_second"] > 0
        assert each["report"]["latency_s"] > 0
        assert each["memory_bytes_per_second"] > 0


def test_two_at_once_take_turns(system: RunningSystem) -> None:
    both = [
        subprocess.Popen(command(*run_dir(system), "--json"), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=COMMAND_TIMEOUT_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert [len(json.loads(answer)["links"]) for answer in answers] == [6, 6]


def test_certificates_are_taken_from_the_run_directory(
    small_arguments: list[str], tmp_path: Path
) -> None:
    write_certificates(tmp_path / "tls")
    (tmp_path / "run").mkdir()
    tls = ["--tls-dir", str(tmp_path / "tls")]
    secure = RunningSystem([*small_arguments, *tls], tmp_path / "run")
    secure.tls = TlsFiles(tls_config(tmp_path / "tls", "router"))
    secure.start()
    try:
        done = doctor(*run_dir(secure))
        assert done.returncode == 0, done.stdout + done.stderr
        secret = ["--secret-file", str(tmp_path / "run" / "registry" / "cluster-secret")]
        named = [a for address in secure.worker_addresses() for a in ("--worker", address)]
        assert doctor(*named, *secret, *tls).returncode == 0
        done = doctor(*named, *secret)
        assert done.returncode == 1
        assert "it speaks TLS and this process plain text" in done.stdout
        assert "--tls-dir" in done.stdout
    finally:
        secure.kill()


def test_workers_named_by_hand(system: RunningSystem) -> None:
    secret = str(system.run_dir / "registry" / "cluster-secret")
    named = [a for address in system.worker_addresses() for a in ("--worker", address)]
    done = doctor(*named, "--worker", "127.0.0.1:1", "--secret-file", secret, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert len(report["links"]) == 6
    (error,) = (each for each in report["findings"] if each["severity"] == "error")
    assert error["subject"] == "127.0.0.1:1" and "Connection refused" in error["problem"]


def test_wrong_secret_is_refused_in_words(system: RunningSystem, tmp_path: Path) -> None:
    wrong = tmp_path / "secret"
    wrong.write_text("f" * 32)
    done = doctor(*run_dir(system), "--secret-file", str(wrong))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("baton: error: no worker measures for this command")
    assert "wrong signature" in done.stderr and "--secret-file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds must be between 1 and"),
        (["--timeout", "0"], "--timeout must be above zero"),
        (["--worker", "127.0.0.1:1"], "without the cluster secret"),
    ],
)
def test_wrong_use_is_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", *arguments], {}) == 2
    assert words in capsys.readouterr().err


def test_worker_with_another_secret_is_named_from_both_sides(
    system: RunningSystem, small_arguments: list[str], tmp_path: Path
) -> None:
    model = small_arguments[small_arguments.index("--model") + 1]
    settings = ["worker_id=stranger", "transfer.cluster_secret=" + "f" * 32, "drain_s=0"]
    settings += ["engine.dtype=float32", "engine.kv_cache_bytes=4000000", "engine.num_threads=1"]
    arguments = ["-m", "services.decode", "--model", model]
    arguments += ["--registry", str(system.run_dir / "registry")]
    arguments += [f"--set={setting}" for setting in settings]
    log = tmp_path / "stranger.log"
    with log.open("wb") as output:
        stranger = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output)
    try:
        deadline_s = time.monotonic() + COMMAND_TIMEOUT_S
        while "ready at" not in log.read_text():
            assert stranger.poll() is None and time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        done = doctor(*run_dir(system), "--json")
    finally:
        stranger.terminate()
        stranger.wait(COMMAND_TIMEOUT_S)
    assert done.returncode == 1, done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    bad = {each["subject"]: each for each in findings if each["severity"] == "error"}
    expected = {f"{one} <- stranger" for one in IDS} | {f"stranger <- {one}" for one in IDS}
    assert bad.keys() == expected
    for error in bad.values():
        assert "wrong signature" in error["problem"]
        assert "transfer.cluster_secret" in error["fix"]


def test_stopped_worker_is_reported_within_the_time_out(system: RunningSystem) -> None:
    entry = json.loads((system.run_dir / "registry" / "decode-1.json").read_text())
    pid = entry["info"]["pid"]
    assert pid in system.members
    os.kill(pid, signal.SIGSTOP)
    try:
        started_s = time.monotonic()
        done = doctor(*run_dir(system), "--timeout", "2", "--json")
        assert time.monotonic() - started_s < COMMAND_TIMEOUT_S
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    (error,) = (each for each in report["findings"] if each["severity"] == "error")
    assert error["subject"] == "decode-1"
    assert "no answer within 2 s" in error["problem"]
    assert f"its process {pid} is stopped by a signal" in error["problem"]
    assert f"kill -CONT {pid}" in error["fix"]
    pairs = {(each["reader"], each["owner"]) for each in report["links"]}
    assert pairs == set(itertools.permutations(("decode-0", "prefill-0"), 2))
    system.assert_nothing_leaked()
