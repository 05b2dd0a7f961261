"""Which transport is chosen, and what is said about it."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.errors import ConfigError, IncompatiblePeer, PeerGone, TransferError
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer import nixl_transport, select
from kvtransfer.metadata import PeerIdentity, open_card
from kvtransfer.nixl_transport import check_readable
from kvtransfer.peer_process import PeerProcess, host_id, pid_namespace, read_memory
from kvtransfer.select import create_transport, needs_shared_pool
from kvtransfer.shm_transport import ShmPool

IDENTITY = PeerIdentity(WorkerId("decode-0"), Epoch("d1"))


def test_only_nixl_can_do_without_shared_memory():
    assert {k: needs_shared_pool(k) for k in ("auto", "shm", "nixl")} == {
        "auto": True,
        "shm": True,
        "nixl": False,
    }
    with pytest.raises(ConfigError, match="auto, nixl, shm, got 'tcp'"):
        needs_shared_pool("tcp")


@pytest.mark.nixl
@pytest.mark.skipif(not nixl_transport.is_installed(), reason="NIXL is not installed")
async def test_auto_takes_nixl_and_says_so(make_pool, open_transport, caplog):
    caplog.set_level(logging.INFO)
    assert open_transport("auto", make_pool("auto", 4)).name == "nixl"
    assert "KV transport: nixl (installed and permitted)" in caplog.text


def test_auto_falls_back_to_shared_memory_and_says_why(make_pool, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    pool = make_pool("auto", 4)

    def no_agent(*args, **kwargs):
        raise TransferError("no NIXL agent here")

    obstacles = {
        "the package is not installed": ("is_installed", lambda: False),
        "process_vm_readv does not work here": ("read_memory", forbidden),
        "no NIXL agent here": ("nixl_transport", no_agent),
    }
    for reason, (name, replacement) in obstacles.items():
        with monkeypatch.context() as patch:
            patch.setattr(select, name, replacement)
            transport = create_transport(
                "auto", pool.region, IDENTITY, b"secret", shared_pool=pool.shared
            )
        assert transport.name == "shm" and reason in caplog.text
        transport._mover.stop(timeout_s=5)


def test_nixl_that_was_asked_for_is_not_replaced(make_pool, monkeypatch):
    pool = make_pool("auto", 4)
    monkeypatch.setattr(nixl_transport, "_MODULES", ("no_such_nixl._api",))
    with pytest.raises(TransferError, match=r"install nixl-cu13 or set .* to shm"):
        create_transport("nixl", pool.region, IDENTITY, b"secret", shared_pool=pool.shared)


def test_contradicting_settings_are_refused(make_pool):
    pool, other = make_pool("shm", 4), ShmPool.create(4096)
    with pytest.raises(ConfigError, match="secret is empty"):
        create_transport("shm", pool.region, IDENTITY, b"", shared_pool=pool.shared)
    with pytest.raises(ConfigError, match="needs a pool in shared memory"):
        create_transport("shm", pool.region, IDENTITY, b"secret")
    with pytest.raises(ConfigError, match="does not lie in"):
        create_transport("shm", pool.region, IDENTITY, b"secret", shared_pool=other)
    with pytest.raises(ConfigError, match="at least 1 byte"):
        ShmPool.create(0)
    other.close()


def test_shared_pool_is_writable_memory_without_a_name():
    before = set(os.listdir("/dev/shm"))
    pool = ShmPool.create(10_000)
    pool.memory[9_999] = 7
    assert ctypes.string_at(pool.address + 9_999, 1) == b"\x07"
    assert len(pool.memory) == 10_000 and not pool.memory.readonly
    assert set(os.listdir("/dev/shm")) == before
    assert os.stat(pool.path).st_mode & 0o777 == 0o600
    with pytest.raises(OSError):
        os.ftruncate(pool.fd, 0)
    pool.close()
    pool.close()


def forbidden(*args: object) -> bytes:
    raise PermissionError(1, "Operation not permitted")


def test_unreadable_peer_is_refused_with_reason_and_fix(make_pool, monkeypatch):
    pool = make_pool("shm", 4)
    transport = create_transport("shm", pool.region, IDENTITY, b"secret", shared_pool=pool.shared)
    card = open_card(transport.card(), b"secret", now_s=0)
    transport._mover.stop(timeout_s=5)
    monkeypatch.setattr(nixl_transport, "read_memory", forbidden)
    with pytest.raises(IncompatiblePeer, match=r"EPERM.*transport to shm.*ptrace_scope"):
        check_readable(card)


def test_processes_are_told_apart_from_their_successors():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = PeerProcess(child.pid)
    assert not process.is_dead()
    child.kill()
    assert process.is_dead(wait_s=5), "a zombie counts as dead"
    child.communicate(timeout=5)
    assert process.is_dead()
    process.close()
    with pytest.raises(PeerGone, match="does not exist"):
        PeerProcess(child.pid)


def test_memory_is_read_or_the_kernel_says_why_not():
    sample = ctypes.create_string_buffer(b"sample", 6)
    assert read_memory(os.getpid(), ctypes.addressof(sample), 6) == b"sample"
    with pytest.raises(OSError):
        read_memory(os.getpid(), 16, 6)
    assert host_id() and pid_namespace().startswith("pid:")
    assert Path("/proc/self/ns/pid").exists()
