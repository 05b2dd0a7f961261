"""A worker process reduced to its KV pool: prints its card, serves it until its stdin closes.

usage: peer_child.py KIND WORKER_ID EPOCH NUM_BLOCKS SEED BLOCK_SIZE [OPTIONS]

KIND nixl-tcp lets NIXL read over emulated TCP, which the transport forbids itself: the one way to
make a read hang with its data outstanding, and to see late writes.

OPTIONS is JSON: `host` to listen on; `heads`, `layers`, `tp_rank`, `tp_size`, and `tokens` true to
fill the pool with a pattern of its tokens (see `token_pattern`) instead of one word per block.

Each line of stdin that holds a nonce in hex is answered with a card made for it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys

import numpy as np

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer import nixl_library
from kvtransfer.metadata import PeerIdentity
from kvtransfer.plan import RankPool
from kvtransfer.select import create_transport, needs_shared_pool
from kvtransfer.shm_transport import ShmPool
from kvtransfer.socket_link import SocketConfig
from kvtransfer.transport import PoolRegion

NONCE = b"nonce of the test"


def allow_reads_over_tcp() -> None:
    """For this process, before its first transport."""
    os.environ["UCX_TLS"] = "tcp"
    nixl_library._UCX_REQUIRED["UCX_PROTO_EMULATION_ENABLE"] = "y"


def token_pattern(pool: RankPool, seed: int) -> np.ndarray:
    """[num_blocks, heads of the rank, layers, 2, block_size, head_dim] of 16 bit, whose values
    follow from token, head of the model, layer, K or V, and dimension alone."""
    layout = pool.layout
    token = np.arange(pool.num_blocks * layout.block_size, dtype=np.uint32)
    token = token.reshape(pool.num_blocks, 1, 1, 1, layout.block_size, 1)
    head = np.arange(pool.heads.start, pool.heads.stop, dtype=np.uint32)[:, None, None, None, None]
    layer = np.arange(layout.num_layers, dtype=np.uint32)[:, None, None, None]
    kv = np.arange(2, dtype=np.uint32)[:, None, None]
    dim = np.arange(layout.head_dim, dtype=np.uint32)
    value = (((token * 31 + head) * 37 + layer) * 2 + kv) * 71 + dim + np.uint32(seed)
    return (value % 65521).astype(np.uint16)


def main(kind: str, worker_id: str, epoch: str, num_blocks: int, seed: int, block_size: int, more):
    if kind == "nixl-tcp":
        allow_reads_over_tcp()
        kind = "nixl"
    layout = KvLayout(
        "test-model", more.get("layers", 30), more.get("heads", 3), 64, block_size, "bfloat16"
    )
    rank = RankPool(layout, more.get("tp_rank", 0), more.get("tp_size", 1), num_blocks)
    shared = ShmPool.create(rank.num_bytes) if needs_shared_pool(kind) else None
    memory = shared.memory if shared else mmap.mmap(-1, rank.num_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if more.get("tokens"):
        np.frombuffer(memory, dtype=np.uint16)[:] = token_pattern(rank, seed).ravel()
    else:
        words = np.frombuffer(memory, dtype=np.uint32).reshape(num_blocks, -1)
        words[:] = (np.arange(num_blocks, dtype=np.uint32) + seed)[:, None]
    region = PoolRegion(
        address, rank.num_bytes, num_blocks, layout, tp_rank=rank.tp_rank, tp_size=rank.tp_size
    )
    identity = PeerIdentity(WorkerId(worker_id), Epoch(epoch))
    socket = SocketConfig(host=more.get("host", "127.0.0.1"))
    transport = create_transport(
        kind, region, identity, b"secret", shared_pool=shared, socket=socket
    )
    print("card", transport.card(NONCE).hex(), flush=True)
    for line in sys.stdin:
        print("card", transport.card(bytes.fromhex(line)).hex(), flush=True)


if __name__ == "__main__":
    a = sys.argv
    main(a[1], a[2], a[3], int(a[4]), int(a[5]), int(a[6]), json.loads(a[7]) if a[7:] else {})
