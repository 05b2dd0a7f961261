"""`baton doctor --settings`: everything that would go wrong is named before anything starts."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.cli import doctor_store
from baton.cli import main as cli
from baton.cli.doctor_before import check_before, read_settings
from baton.cli.doctor_devices import (
    check_memory,
    check_nics,
    check_shm,
    check_visible_gpus,
    memory_limit_bytes,
)
from baton.cli.doctor_store import check_store, judge_clock, judge_server
from baton.cli.doctor_types import Check, Severity
from baton.cli.doctor_versions import check_versions
from baton.core.config import merge
from baton.core.errors import ConfigError
from certificates import make_certificates, reissue
from made_up_worker import MODEL
from redis_server import RedisServer
from services.planner.profile_file import profile_json
from tiny_llama import write_checkpoint, write_pair_tokenizer

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
SECRET = {"BATON_TRANSFER__CLUSTER_SECRET": "s" * 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", vocab_size=256)
    write_pair_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """Settings as the chart mounts them, in order."""
    made = tmp_path / "settings"
    made.mkdir()
    change(made, "router", {"model_path": str(model), "http_port": 0, "grpc_port": 0})
    for pool in ("prefill", "decode"):
        engine = {"model_path": str(model), "kv_cache_bytes": 4_000_000}
        change(made, pool, {"role": pool, "host": "0.0.0.0", "engine": engine})
    return made


def change(folder: Path, process: str, values: Mapping[str, Any]) -> None:
    file = folder / f"{process}.yaml"
    known = yaml.safe_load(file.read_text()) if file.exists() else {}
    file.write_text(yaml.safe_dump(merge(known, values)))


def bad(checks: list[Check]) -> list[Check]:
    """Those of settings, not of this machine's own transports and limits."""
    mine = ("settings", "pools", "model", "secrets", "certificates", "ports", "Redis", "clock")
    mine += ("tracing",)
    mine += ("GPUs", "memory", "shared memory", "versions")
    return [c for c in checks if c.severity is ERROR and c.name.startswith(mine)]


def test_settings_in_order_have_no_error(folder: Path) -> None:
    checks = check_before(folder, SECRET)
    assert bad(checks) == []
    names = {check.name for check in checks}
    assert names >= {
        "versions", "settings", "pools", "model files", "model", "ports", "GPUs", "memory",
        "shared memory", "NIC", "disk tier",
    }  # fmt: skip


def test_settings_of_a_running_system_are_read_too(folder: Path) -> None:
    (folder / "prefill.yaml").rename(folder / "prefill-0.yaml")
    assert set(read_settings(folder, SECRET).workers) == {"prefill-0", "decode"}
    assert bad(check_before(folder, SECRET)) == []


KEYS = "tenants.keys_file"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("router", {"edge": {"max_body_byte": 1}}, r"max_body_byte"),
    ("decode", {"engine": {"dtype": "int3"}}, r"dtype 'int3'"),
    ("decode", {"engine": {"block_size": 32}}, r"engine.block_size is 16 .* and 32"),
    ("prefill", {"engine": {"revision": "b"}}, r"engine.revision is b"),
    ("prefill", {"engine": {"tp_size": 3}}, r"tp_size"),
    ("decode", {"engine": {"max_model_len": 100_000}}, r"max_model_len 100000 is outside 1..512"),
    ("decode", {"engine": {"model_path": "/nowhere"}}, r"model folder /nowhere does not exist"),
    ("router", {"tenants": {"keys_file": "/nowhere.json"}}, r"keys_file /nowhere.json does not"),
    ("prefill", {"engine": {"kv_cache_bytes": 10**15}}, r"kv_cache_bytes of prefill is 1000000.0"),
    ("decode", {"tiers": {"host_bytes": 10**15}}, r"tiers.host_bytes of decode"),
    ("router", {"http_port": 8123, "grpc_port": 8123}, r"http_port 8123, grpc_port 8123"),
    ("router", {"host": "203.0.113.7", "http_port": 80}, r"http_port 80 on 203.0.113.7: "),
    ("decode", {"registry": {"url": "redis://127.0.0.1:1/0"}}, r"refused|not reach|Redis"),
]


@pytest.mark.parametrize(("process", "values", "reason"), WRONG, ids=[w[2][:30] for w in WRONG])
def test_what_is_wrong_is_named(
    folder: Path, process: str, values: dict[str, Any], reason: str
) -> None:
    change(folder, process, values)
    found = bad(check_before(folder, SECRET))
    assert len(found) == 1 and re.search(reason, found[0].found), found


def test_gpus_that_are_not_there_are_missed(folder: Path) -> None:
    for pool in ("prefill", "decode"):
        change(folder, pool, {"engine": {"device": "cuda", "kv_cache_bytes": None}})
    (found,) = bad(check_before(folder, SECRET | {"CUDA_VISIBLE_DEVICES": ""}))
    assert found.name == "GPUs" and "needs 1, and 0 are visible" in found.found


def test_a_missing_secret_is_named(folder: Path) -> None:
    found = bad(check_before(folder, {}))
    assert len(found) == 2 and all("transfer.cluster_secret is not set" in f.found for f in found)
    assert all("BATON_TRANSFER__CLUSTER_SECRET" in f.fix for f in found)


def test_certificates_are_tried(folder: Path, tmp_path: Path) -> None:
    tls = make_certificates(tmp_path / "tls")
    files = {"ca_file": f"{tls}/ca.pem", "cert_file": f"{tls}/worker.pem"}
    files["key_file"] = f"{tls}/worker-key.pem"
    change(folder, "prefill", {"tls": files})
    (half,) = bad(check_before(folder, SECRET))
    assert "and others none" in half.found
    for process in ("router", "decode"):
        change(folder, process, {"tls": files})
    assert bad(check_before(folder, SECRET)) == []
    reissue(tls, "old", shift_days=-3)
    old = {"cert_file": f"{tls}/old.pem", "key_file": f"{tls}/old-key.pem"}
    change(folder, "router", {"edge": {"tls": old}, "tls": old})
    inside, door = bad(check_before(folder, SECRET))
    assert "would be refused by peers: it has expired" in inside.found
    assert "would be refused by clients: certificate has expired" in door.found


def test_weights_are_asked_for_where_somebody_reads_them(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for process, section in (("router", None), ("prefill", "engine"), ("decode", "engine")):
        path = {"model_path": str(bare)}
        change(folder, process, path if section is None else {section: path})
    (found,) = bad(check_before(folder, SECRET))
    assert found.name == "model files" and "*.safetensors" in found.found
    for pool in ("prefill", "decode"):
        change(folder, pool, {"engine": {"load_format": "dummy"}})
    assert bad(check_before(folder, SECRET)) == []


def test_tracing_without_its_packages_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder, "router", {"tracing": {"otlp_endpoint": "http://127.0.0.1:4317"}})
    assert bad(check_before(folder, SECRET)) == []
    monkeypatch.setitem(sys.modules, "baton.telemetry.otlp", None)
    (found,) = bad(check_before(folder, SECRET))
    assert found.name == "tracing" and "extra `tracing`" in found.found


def test_taken_ports_are_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        change(folder, "router", {"copy": {"own_port": port}})
        change(folder, "decode", {"host": "127.0.0.1", "port": port})
        found = bad(check_before(folder, SECRET))
    assert [f.found.split(" on ")[0] for f in found] == [
        f"router: copy.own_port {port}",
        f"decode: port {port}",
    ]


def test_settings_of_a_planner_are_tried_with_its_figures(folder: Path) -> None:
    assert not [c for c in check_before(folder, SECRET) if c.name == "planner"]
    profile = folder / "profile.json"
    autoscale = {"ttft_s": 0.5, "itl_s": 0.05, "max_devices": 4}
    change(folder, "planner", {"autoscale": autoscale, "models": {"profile": str(profile)}})
    (missing,) = [c for c in check_before(folder, SECRET) if c.name == "planner"]
    assert missing.severity is ERROR and str(profile) in missing.found
    profile.write_text(json.dumps(profile_json(MODEL, MODEL, kv_bytes_per_token=1, source="made")))
    (found,) = [c for c in check_before(folder, SECRET) if c.name == "planner"]
    assert found.severity is not ERROR
    assert "keeps TTFT 0.5 s and ITL 0.05 s on 4 devices" in found.found


def test_a_folder_without_settings_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no router.yaml, prefill.yaml or decode.yaml"):
        check_before(tmp_path, {})


def test_the_command_says_so_as_text_and_as_json(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in SECRET.items():
        monkeypatch.setenv(name, value)
    change(folder, "decode", {"engine": {"block_size": 32}})
    assert cli.main(["doctor", "--settings", str(folder)]) == 1
    assert "ERROR   this machine: pools: engine.block_size is 16" in capsys.readouterr().out
    assert cli.main(["doctor", "--settings", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["is_healthy"] is False and report["workers"] == []
    (error,) = (f for f in report["findings"] if f["severity"] == "error")
    assert "block_size" in error["problem"]
    assert cli.main(["doctor", "--settings", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# Redis and the clock.


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = RedisServer(tmp_path_factory.mktemp("redis"), password="a-secret-word")
    server.start()
    yield server.url
    server.stop()


def test_a_store_that_works(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server, clock = check_store(redis_url)
    assert server.severity is None and "takes writes" in server.found
    assert clock.severity is None
    now_s = doctor_store.time.time
    monkeypatch.setattr(doctor_store.time, "time", lambda: now_s() + 90)
    _, clock = check_store(redis_url)
    assert clock.severity is ERROR and "90.0" in clock.found


def test_a_store_that_refuses_is_told_without_its_password(redis_url: str) -> None:
    (check,) = check_store(redis_url.replace("a-secret-word", "another-word"))
    assert check.severity is ERROR
    assert "another-word" not in f"{check.found} {check.fix}"


@pytest.mark.parametrize(
    ("information", "severity", "words"),
    [
        ({"redis_version": "5.0.14"}, ERROR, "6.2 is needed"),
        ({"redis_version": "7.2.1", "cluster_enabled": 1}, ERROR, "as a cluster"),
        (
            {"redis_version": "7.2.1", "maxmemory": 1, "maxmemory_policy": "allkeys-lru"},
            WARNING,
            "allkeys-lru",
        ),
        ({"redis_version": "7.2.1", "maxmemory": 1, "maxmemory_policy": "noeviction"}, None, ""),
    ],
)
def test_servers_that_do_not_fit(
    information: dict[str, Any], severity: Severity | None, words: str
) -> None:
    check = judge_server(information)
    assert check.severity is severity and words in check.found


@pytest.mark.parametrize(
    ("server_s", "severity"),
    [(100.5, None), (99.7, None), (102.0, WARNING), (98.0, WARNING), (0.0, ERROR)],
)
def test_clocks(server_s: float, severity: Severity | None) -> None:
    assert judge_clock(server_s, 100.0, 101.0).severity is severity


# Versions and devices.


def test_versions_that_do_not_fit() -> None:
    installed = {"torch": "2.9.0", "ray": "2.60.0"}
    asked = ["torch>=2.11", "ray[serve]>=2.60", "redis>=5", "x>=1; extra == 'test'", "???"]
    found = list(check_versions(asked, installed.get))
    assert [check.found for check in found] == [
        "torch is 2.9.0, and >=2.11 is needed",
        "redis is not installed, and >=5 is needed",
    ]
    (fine,) = check_versions(["torch>=2.9"], installed.get)
    assert fine.severity is None and "torch 2.9.0" in fine.found
    assert [check.severity for check in check_versions()] == [None]


def test_shared_memory_that_is_too_small(tmp_path: Path) -> None:
    assert check_shm(tmp_path / "none", 1).severity is ERROR
    assert check_shm(tmp_path, 1).severity is None
    found = check_shm(tmp_path, 10**9)
    assert found.severity is ERROR and "1000000000 ranks need" in found.found


def test_network_devices_that_are_down(tmp_path: Path) -> None:
    (none,) = check_nics(tmp_path / "none")
    assert none.severity is None and "no RDMA device" in none.found
    for device, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / device / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    (tmp_path / "mlx5_2").mkdir()
    up, down, bare = check_nics(tmp_path)
    assert up.severity is None and up.found == "mlx5_0: port 1 ACTIVE"
    assert down.severity is WARNING and "port 1 DOWN" in down.found
    assert bare.severity is WARNING and "no port" in bare.found


def test_gpus_beside_what_is_asked() -> None:
    assert check_visible_gpus([], [("prefill", 0)]).severity is None
    assert check_visible_gpus(["0", "1"], [("prefill", 2), ("decode", 1)]).severity is None
    found = check_visible_gpus(["0", "1"], [("prefill", 2), ("decode", 4)])
    assert found.severity is ERROR and "a decode worker needs 4, and 2 are" in found.found


def test_memory_limit_is_the_smallest_that_holds(tmp_path: Path) -> None:
    limit, none = tmp_path / "memory.max", tmp_path / "none"
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       8000 kB\nMemFree: 1 kB\n")
    limit.write_text("max\n")
    assert memory_limit_bytes([none, limit], meminfo) == 8_192_000
    limit.write_text("4096\n")
    assert memory_limit_bytes([none, limit], meminfo) == 4096
    assert memory_limit_bytes([none], none) is None
    assert check_memory(None, [("x", 10)]).severity is None
    assert check_memory(4096, [("x", 4095)]).severity is None
    assert check_memory(4096, [("x", 1), ("y", 4096)]).severity is ERROR
