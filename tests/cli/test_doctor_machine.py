"""What `baton doctor` says of the machine it runs on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from baton.cli import doctor_machine
from baton.cli.doctor_limits import judge_limits, judge_ucx, parse_limits
from baton.cli.doctor_types import Severity
from kvtransfer.tiers.config import TierConfig

DEVICES = {"lo", "eth0", "mlx5_0"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"UCX_NET_DEVICES": "lo,mlx5_0:1", "UCX_TLS": "cma,tcp"},
        {"UCX_TLS": "all", "UCX_NET_DEVICES": "all", "UCX_PROTO_EMULATION_ENABLE": "n"},
        {"UCX_TLS": "^rc"},
    ],
)
def test_harmless_ucx_variables(variables):
    assert list(judge_ucx(variables, DEVICES, has_gpu=False)) == []


@pytest.mark.parametrize(
    ("variables", "has_gpu", "found", "fix"),
    [
        ({"UCX_NET_DEVICES": "ib7"}, False, "names ib7, this machine has eth0", "leave it out"),
        ({"UCX_TLS": "shm"}, False, "no transport that notices a dead peer", "tcp"),
        ({"UCX_TLS": "tcp"}, False, "leaves out reads of another process", "cma"),
        ({"UCX_TLS": "cma,tcp"}, True, "leaves out GPUs", "cuda"),
        ({"UCX_TLS": "^cma"}, False, "excludes reads of another process", "leave UCX_TLS out"),
        ({"UCX_PROTO_EMULATION_ENABLE": "y"}, False, "overridden", "leave it out"),
    ],
)
def test_ucx_variables_that_hurt(variables, has_gpu, found, fix):
    (check,) = judge_ucx(variables, DEVICES, has_gpu=has_gpu)
    assert found in check.found
    assert fix in check.fix


def test_limits_are_read_as_the_kernel_writes_them():
    limits = parse_limits(Path("/proc/self/limits").read_text())
    assert "Max open files" in limits and "Max locked memory" in limits
    text = "Limit  Soft  Hard  Units\nMax open files            512       unlimited  files\n"
    assert parse_limits(text) == {"Max open files": 512}
    assert parse_limits(text.replace("512", "unlimited")) == {"Max open files": None}


@pytest.mark.parametrize(
    ("limits", "num_open", "has_rdma", "words"),
    [
        ({"Max open files": 2000}, 60, False, []),
        ({"Max open files": None, "Max locked memory": 65536}, 60, False, []),
        ({"Max open files": 256}, 60, False, ["256 open files are allowed"]),
        ({"Max open files": 2000}, 1900, False, ["1900 of 2000 files are open"]),
        ({"Max locked memory": 65536}, 60, True, ["RDMA locks the whole pool"]),
    ],
)
def test_limits_that_hurt(limits, num_open, has_rdma, words):
    checks = list(judge_limits(limits, num_open, has_rdma=has_rdma))
    assert len(checks) == len(words)
    for check, word in zip(checks, words, strict=True):
        assert word in check.found
        assert "ulimit" in check.fix


def test_this_machine_is_looked_at_without_traces(tmp_path):
    files = len(os.listdir("/proc/self/fd"))
    tiers = TierConfig(host_bytes=1, disk_bytes=1 << 20, disk_path=tmp_path)
    checks = doctor_machine.check_machine({}, {"decode-0": os.getpid()}, tiers)
    assert {"NIXL", "memory files", "pidfd", "GPU", "disk tier", "shared memory", "NIC"} <= {
        check.name for check in checks
    }
    assert all(check.found for check in checks)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files


def test_missing_nixl_is_a_note_with_a_fix(monkeypatch):
    monkeypatch.setattr(doctor_machine, "nixl_obstacle", lambda: "the package is not installed")
    check = doctor_machine.check_nixl()
    assert check.severity is Severity.NOTE
    assert "pip install nixl-cu13" in check.fix


def test_variables_of_the_workers_count_not_those_of_the_shell():
    own = {"decode-0": os.getpid()}
    (check,) = doctor_machine.check_ucx({"UCX_NET_DEVICES": "ib7"}, own)
    assert check.severity is None and "decode-0" in check.found
    (check,) = doctor_machine.check_ucx({"UCX_NET_DEVICES": "ib7"}, {})
    assert check.severity is Severity.WARNING and "this shell" in check.name


def test_disk_tier_that_cannot_be_used(tmp_path):
    missing = TierConfig(host_bytes=1, disk_bytes=1, disk_path=tmp_path / "missing")
    check = doctor_machine.check_disk_tier(missing)
    assert check.severity is Severity.ERROR and "is no directory" in check.found
    assert doctor_machine.check_disk_tier(TierConfig()).severity is None


def test_file_system_is_that_of_the_deepest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n")
    assert doctor_machine.file_system_of(tmp_path / "kv", mounts) == "nfs4"
    assert doctor_machine.file_system_of(Path("/"), mounts) == "ext4"
    assert doctor_machine.file_system_of(Path("/"), tmp_path / "none") == ""
