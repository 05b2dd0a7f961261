"""Which transports a worker offers, and what is said about those it does not."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.errors import ConfigError, PeerGone, TransferError
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer import nixl_library, nixl_transport, select
from kvtransfer.metadata import PeerCard, PeerIdentity, open_card
from kvtransfer.peer_process import PeerProcess, host_id, pid_namespace, read_memory
from kvtransfer.select import TransportKind, create_transport, needs_shared_pool
from kvtransfer.shm_transport import ShmPool

IDENTITY = PeerIdentity(WorkerId("decode-0"), Epoch("d1"))
NONCE = b"nonce of the test"


def opened(wire: bytes) -> PeerCard:
    return open_card(wire, b"secret", now_s=0.0, nonce=NONCE)


def test_shared_memory_is_needed_where_it_may_be_offered():
    assert {k.value: needs_shared_pool(k) for k in TransportKind} == {
        "auto": True,
        "nixl": False,
        "mapped": False,
        "shm": True,
        "socket": False,
    }
    with pytest.raises(ConfigError, match="auto, nixl, mapped, shm, socket, got 'tcp'"):
        needs_shared_pool("tcp")


@pytest.mark.nixl
@pytest.mark.skipif(not nixl_library.is_installed(), reason="NIXL is not installed")
async def test_auto_offers_all_and_prefers_mapped_memory(make_pool, open_transport, caplog):
    caplog.set_level(logging.INFO)
    transport = open_transport("auto", make_pool("auto", 4))
    assert transport.name == "shm" and transport.names == ("shm", "nixl", "socket")
    assert transport.obstacles == {} and "KV transports: shm, nixl, socket" in caplog.text
    card = opened(transport.card(NONCE))
    assert [e.transport for e in card.endpoints] == ["shm", "nixl", "socket"]


@pytest.mark.parametrize("kind", ["shm", "socket"])
async def test_named_transport_is_the_only_one_offered(kind, make_pool, open_transport):
    transport = open_transport(kind, make_pool(kind, 4))
    assert transport.names == (kind,)
    assert [e.transport for e in opened(transport.card(NONCE)).endpoints] == [kind]


async def test_auto_goes_on_without_nixl_and_says_why(
    make_pool, open_transport, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    pool = make_pool("auto", 4)

    def no_agent(self):
        raise TransferError("no NIXL agent here")

    obstacles = {
        "the package is not installed": (select, "is_installed", lambda: False),
        "process_vm_readv does not work here": (select, "read_memory", forbidden),
        "no NIXL agent here": (nixl_transport.NixlLink, "open", no_agent),
    }
    for reason, (owner, name, replacement) in obstacles.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, replacement)
            transport = open_transport("auto", pool)
        assert transport.names == ("shm", "socket") and reason in transport.obstacles["nixl"]
        assert f"KV transport nixl is not usable: {reason}" in caplog.text


def test_nixl_that_was_asked_for_is_not_replaced(make_pool, monkeypatch):
    pool = make_pool("auto", 4)
    monkeypatch.setattr(nixl_library, "_MODULES", ("no_such_nixl._api",))
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
    with pytest.raises(ConfigError, match="mapped does not move KV in host memory; take auto or"):
        create_transport("mapped", pool.region, IDENTITY, b"secret")
    on_gpu = dataclasses.replace(pool.region, device_id=0)
    with pytest.raises(ConfigError, match="GPU memory; take auto or one of mapped, nixl"):
        create_transport("socket", on_gpu, IDENTITY, b"secret")
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


WRONG_NIC = """
import os, sys
os.environ["UCX_NET_DEVICES"] = sys.argv[1]
import ctypes, mmap
from baton.core.errors import TransferError
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import PeerIdentity
from kvtransfer.select import create_transport
from kvtransfer.transport import PoolRegion
layout = KvLayout("test-model", 1, 1, 64, 16, "bfloat16")
memory = mmap.mmap(-1, layout.block_bytes)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
region = PoolRegion(address, layout.block_bytes, 1, layout)
try:
    transport = create_transport("nixl", region, PeerIdentity(WorkerId("w"), Epoch("e")), b"secret")
except TransferError as error:
    print("refused:", error)
else:
    print("opened")
    transport._mover.stop(timeout_s=10)
"""


@pytest.mark.nixl
@pytest.mark.skipif(not nixl_library.is_installed(), reason="NIXL is not installed")
@pytest.mark.parametrize(
    ("devices", "outcome"),
    [
        ("nosuch7", "refused: no KV transport works here: nixl: UCX_NET_DEVICES names nosuch7"),
        ("lo,mlx5_9:1", "refused: no KV transport works here: nixl: UCX_NET_DEVICES names mlx5_9"),
        ("lo", "opened"),
        ("all", "opened"),
    ],
)
def test_wrong_network_device_is_named_at_the_start(devices, outcome):
    child = subprocess.run(
        [sys.executable, "-c", WRONG_NIC, devices],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert outcome in child.stdout, child.stdout + child.stderr
