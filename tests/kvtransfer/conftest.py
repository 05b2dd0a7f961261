"""Pools, peers in their own processes, and a fake fabric for the tests of kvtransfer."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.block_read import MoverLimits
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.nixl_library import is_installed
from kvtransfer.select import create_transport, needs_shared_pool
from kvtransfer.shm_transport import ShmPool
from kvtransfer.transport import PoolRegion

SECRET = b"secret"
NONCE = b"nonce of the test"
"""Every card of these tests is made for it."""
UNTOUCHED = 0xFFFFFFFF
CHILD = Path(__file__).with_name("peer_child.py")
READER = CHILD.with_name("reader_child.py")
ROOT = CHILD.parents[2]


def cpu_layout(block_size: int = 16) -> KvLayout:
    """The laptop model: 23,040 bytes a token."""
    return KvLayout("test-model", 30, 3, 64, block_size, "bfloat16")


@dataclass
class Pool:
    """A local pool whose blocks are full of UNTOUCHED."""

    region: PoolRegion
    words: np.ndarray
    shared: ShmPool | None
    memory: object

    @classmethod
    def create(
        cls,
        kind: str,
        num_blocks: int,
        layout: KvLayout | None = None,
        num_scratch_blocks: int = 0,
    ) -> Pool:
        layout = layout or cpu_layout()
        num_bytes = num_blocks * layout.block_bytes
        shared = ShmPool.create(num_bytes) if needs_shared_pool(kind) else None
        memory = shared.memory if shared else mmap.mmap(-1, num_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        words = np.frombuffer(memory, dtype=np.uint32).reshape(num_blocks, -1)
        words[:] = UNTOUCHED
        region = PoolRegion(
            address, num_bytes, num_blocks, layout, num_scratch_blocks=num_scratch_blocks
        )
        return cls(region, words, shared, memory)

    def holds(self, local: list[int], remote: list[int], seed: int) -> bool:
        expected = np.asarray(remote, dtype=np.uint32) + np.uint32(seed)
        return bool((self.words[local] == expected[:, None]).all())

    def clear(self) -> None:
        self.words[:] = UNTOUCHED

    def untouched(self, blocks: list[int]) -> bool:
        return bool((self.words[blocks] == UNTOUCHED).all())


@dataclass
class Peer:
    """A peer process. Killed at the end of the test whatever happens."""

    process: subprocess.Popen[bytes]
    card: bytes
    worker_id: WorkerId

    def signal(self, number: signal.Signals) -> None:
        """Returns once the process has stopped, if that is what the signal does."""
        os.kill(self.process.pid, number)
        deadline_s = time.monotonic() + 5
        while number is signal.SIGSTOP and not self._has_stopped():
            assert time.monotonic() < deadline_s, "the peer does not stop"
            time.sleep(0.001)

    def _has_stopped(self) -> bool:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0] == "T"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)


@dataclass
class Reader:
    """A reading process that reports in lines."""

    process: subprocess.Popen[bytes]

    def line(self) -> str:
        return read_line(self.process, "> ")


def read_line(process: subprocess.Popen[bytes], prefix: str) -> str:
    """What follows `prefix` in the next line that starts with it; other output is skipped."""
    assert process.stdout is not None
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        if not select.select([process.stdout], [], [], 0.5)[0]:
            continue
        line = process.stdout.readline().decode()
        if line.startswith(prefix):
            return line.removeprefix(prefix).strip()
        if not line:
            break
    raise AssertionError(f"the process printed no line that starts with {prefix!r}")


@dataclass
class Peers:
    """Starts peer processes."""

    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self,
        kind: str,
        worker_id: str = "prefill-0",
        *,
        epoch: str = "e1",
        num_blocks: int = 64,
        seed: int = 1000,
        block_size: int = 16,
        prefix: tuple[str, ...] = (),
        **options: object,
    ) -> Peer:
        """`prefix` goes before the command, `options` are those of peer_child.py."""
        arguments = [kind, worker_id, epoch, str(num_blocks), str(seed), str(block_size)]
        process = self._spawn(CHILD, *arguments, json.dumps(options), prefix=prefix)
        card = bytes.fromhex(read_line(process, "card "))
        return Peer(process, card, WorkerId(worker_id))

    def start_reader(self, peer: Peer, mode: str) -> Reader:
        return Reader(self._spawn(READER, mode, peer.card.hex()))

    def _spawn(
        self, script: Path, *arguments: str, prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [*prefix, sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Unbuffered: `select` must see every line that is not read yet.
            bufsize=0,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{CHILD.parent}"},
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(5)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()


@pytest.fixture
def peers() -> Iterator[Peers]:
    started = Peers()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def make_pool() -> Iterator[Callable[..., Pool]]:
    """Makes pools and gives their shared memory back."""
    made: list[Pool] = []

    def make(
        kind: str,
        num_blocks: int,
        layout: KvLayout | None = None,
        num_scratch_blocks: int = 0,
    ) -> Pool:
        made.append(Pool.create(kind, num_blocks, layout, num_scratch_blocks))
        return made[-1]

    yield make
    for pool in made:
        if pool.shared is not None:
            pool.shared.close()


@pytest.fixture
async def open_transport():
    """Makes transports of this process and closes them."""
    opened: list[MoverTransport] = []

    def make(
        kind: str, pool: Pool, *, limits: MoverLimits | None = None, secret: bytes = SECRET
    ) -> MoverTransport:
        transport = create_transport(
            kind,
            pool.region,
            PeerIdentity(WorkerId("decode-0"), Epoch("d1")),
            secret,
            shared_pool=pool.shared,
            limits=limits,
        )
        opened.append(transport)
        return transport

    yield make
    for transport in opened:
        await transport.close()


@pytest.fixture
def token_pattern() -> Callable[..., np.ndarray]:
    """What peer_child.py fills its pool with when told `tokens`."""
    spec = importlib.util.spec_from_file_location("peer_child", CHILD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.token_pattern


@pytest.fixture(
    params=[
        pytest.param(
            "nixl",
            marks=[
                pytest.mark.nixl,
                pytest.mark.skipif(not is_installed(), reason="NIXL is not installed"),
            ],
        ),
        "shm",
        "socket",
    ]
)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
