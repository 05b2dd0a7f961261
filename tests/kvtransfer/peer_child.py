"""A worker process reduced to its KV pool: prints its card, serves it until its stdin closes.

usage: peer_child.py KIND WORKER_ID EPOCH NUM_BLOCKS SEED BLOCK_SIZE

KIND nixl-tcp lets NIXL read over emulated TCP, which the transport forbids itself: the one way to
make a read hang with its data outstanding, and to see late writes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import numpy as np

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer import nixl_transport
from kvtransfer.metadata import PeerIdentity
from kvtransfer.select import create_transport, needs_shared_pool
from kvtransfer.shm_transport import ShmPool
from kvtransfer.transport import PoolRegion


def allow_reads_over_tcp() -> None:
    """For this process, before its first transport."""
    os.environ["UCX_TLS"] = "tcp"
    nixl_transport._UCX_REQUIRED["UCX_PROTO_EMULATION_ENABLE"] = "y"


def main(kind: str, worker_id: str, epoch: str, num_blocks: int, seed: int, block_size: int):
    if kind == "nixl-tcp":
        allow_reads_over_tcp()
        kind = "nixl"
    layout = KvLayout("test-model", 30, 3, 64, block_size, "bfloat16")
    num_bytes = num_blocks * layout.block_bytes
    shared = ShmPool.create(num_bytes) if needs_shared_pool(kind) else None
    memory = shared.memory if shared else mmap.mmap(-1, num_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    words = np.frombuffer(memory, dtype=np.uint32).reshape(num_blocks, -1)
    words[:] = (np.arange(num_blocks, dtype=np.uint32) + seed)[:, None]
    region = PoolRegion(address, num_bytes, num_blocks, layout)
    identity = PeerIdentity(WorkerId(worker_id), Epoch(epoch))
    transport = create_transport(kind, region, identity, b"secret", shared_pool=shared)
    print("card", transport.card().hex(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    a = sys.argv
    main(a[1], a[2], a[3], int(a[4]), int(a[5]), int(a[6]))
