"""Pools that other processes map: in files, which stand for device memory, or on GPUs.

As a script, an owner reduced to its pool: `mapped_files.py JSON` answers each nonce in hex on its
stdin with a card in hex, until its stdin closes. JSON: worker_id, epoch, heads, block_size,
num_blocks, tp_rank, tp_size; and for a GPU device_id and kind (of the transport).
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import IncompatiblePeer
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.group_card import join_cards
from kvtransfer.mapped_link import MappedLink
from kvtransfer.metadata import MappedEndpoint, PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.plan import RankPool
from kvtransfer.select import create_transport
from kvtransfer.shm_transport import ShmPool
from kvtransfer.transport import PoolRegion

SECRET = b"secret"
NUM_LAYERS, HEAD_DIM = 2, 8


class FileMapper:
    """Implements `MemoryMapper`; the handle is the file's name."""

    def __init__(self, pool: ShmPool) -> None:
        self._pool = pool
        self.num_mapped = 0

    def use(self) -> None:
        return

    def export(self, address: int, num_bytes: int) -> MappedEndpoint:
        offset = address - self._pool.address
        return MappedEndpoint(self._pool.path.encode(), "no GPU", offset, num_bytes)

    def open(self, endpoint: MappedEndpoint, num_bytes: int) -> FileMapping:
        try:
            fd = os.open(endpoint.handle.decode(), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise IncompatiblePeer(f"the file cannot be opened: {error.strerror}") from None
        length = endpoint.pool_offset + num_bytes
        content = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        os.close(fd)
        self.num_mapped += 1
        return FileMapping(self, content, endpoint.pool_offset)


class FileMapping:
    def __init__(self, mapper: FileMapper, content: mmap.mmap, offset: int) -> None:
        self._mapper = mapper
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(content, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data) + offset

    def close(self) -> None:
        assert self._bytes is not None, "closed twice"
        # The last reference, so the memory is unmapped now and a late read would be a crash.
        self._bytes = None
        self._mapper.num_mapped -= 1


def token_pattern(pool: RankPool, num_tokens: int) -> NDArray[np.uint16]:
    """[tokens, heads of the rank, layers, 2, head_dim]: no number twice in a model, none 0."""
    shape = (num_tokens, pool.layout.num_kv_heads, NUM_LAYERS, 2, HEAD_DIM)
    assert np.prod(shape) < 1 << 16
    values = np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape)
    return values[:, list(pool.heads)]


def as_blocks(tokens: NDArray[np.uint16], pool: RankPool) -> NDArray[np.uint16]:
    """[blocks, heads, layers, 2, block_size, head_dim] of the tokens of whole blocks."""
    blocks = tokens.reshape(-1, pool.layout.block_size, *tokens.shape[1:])
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1, 5))


def layout_of(heads: int, block_size: int) -> KvLayout:
    return KvLayout("m", NUM_LAYERS, heads, HEAD_DIM, block_size, "bfloat16")


class _NoCopier:
    """Of an owner that never reads."""


def owner_in_file(pool: RankPool, identity: PeerIdentity) -> MoverTransport:
    memory = ShmPool.create(pool.num_bytes)
    np.frombuffer(memory.memory, dtype=np.uint16)[:] = pool_content(pool)
    region = region_of(pool, memory.address)
    return MoverTransport(
        links=[MappedLink(region, FileMapper(memory), _NoCopier)],  # type: ignore[arg-type]
        region=region,
        identity=identity,
        secret=SECRET,
    )


def owner_on_gpu(
    pool: RankPool, identity: PeerIdentity, device_id: int, kind: str
) -> MoverTransport:
    import torch

    words = torch.from_numpy(pool_content(pool).view(np.int16)).to(f"cuda:{device_id}")
    # Kept for as long as the process lives.
    _KEPT.append(words)
    torch.cuda.synchronize(device_id)
    region = region_of(pool, words.data_ptr(), device_id=device_id)
    return create_transport(kind, region, identity, SECRET)


_KEPT: list[object] = []


def pool_content(pool: RankPool) -> NDArray[np.uint16]:
    tokens = token_pattern(pool, pool.num_blocks * pool.layout.block_size)
    return as_blocks(tokens, pool).ravel()


def region_of(
    pool: RankPool, address: int, *, device_id: int | None = None, num_scratch_blocks: int = 0
) -> PoolRegion:
    return PoolRegion(
        address,
        pool.num_bytes,
        pool.num_blocks,
        pool.layout,
        device_id=device_id,
        num_scratch_blocks=num_scratch_blocks,
        tp_rank=pool.tp_rank,
        tp_size=pool.tp_size,
    )


def main(values: dict[str, Any]) -> None:
    layout = layout_of(values["heads"], values["block_size"])
    pool = RankPool(layout, values["tp_rank"], values["tp_size"], values["num_blocks"])
    identity = PeerIdentity(WorkerId(values["worker_id"]), Epoch(values["epoch"]))
    if "device_id" in values:
        transport = owner_on_gpu(pool, identity, values["device_id"], values["kind"])
    else:
        transport = owner_in_file(pool, identity)
    for line in sys.stdin:
        print(transport.card(bytes.fromhex(line)).hex(), flush=True)


def start_owner(
    *, environ: Mapping[str, str] | None = None, **values: object
) -> subprocess.Popen[str]:
    """A rank of an owner, in a process of its own."""
    return start_script(Path(__file__), json.dumps(values), environ=environ or {})


def start_script(
    script: Path, *arguments: str, environ: Mapping[str, str]
) -> subprocess.Popen[str]:
    """A script of this folder that answers on its standard output; `environ` beside ours."""
    folders = (str(script.parents[2]), str(script.parent), os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(filter(None, folders))
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ, "PYTHONPATH": path},
    )


@dataclass
class Owner:
    """The ranks of a worker, each a process."""

    processes: list[subprocess.Popen[str]]

    def card(self, nonce: bytes) -> bytes:
        cards = []
        for process in self.processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(nonce.hex() + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            # Libraries of GPUs greet on standard output.
            while line and not _is_hex(line):
                line = process.stdout.readline()
            cards.append(bytes.fromhex(line))
        return join_cards(cards)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def _is_hex(line: str) -> bool:
    return len(line) > 1 and set(line.strip()) <= set("0123456789abcdef")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
