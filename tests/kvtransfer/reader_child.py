"""A reader over emulated TCP that gives up on a stopped peer, then counts late writes.

usage: reader_child.py recycle|wait CARD_HEX

Prints "> given up" when its blocks are cleared and the peer may go on, then "> late writes N".
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import sys

import numpy as np
from peer_child import allow_reads_over_tcp

from baton.core.errors import TransferTimeout
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.block_read import MoverLimits
from kvtransfer.metadata import PeerIdentity
from kvtransfer.select import create_transport
from kvtransfer.transport import PoolRegion

NUM_BLOCKS = 32
NONCE = b"nonce of the test"


async def main(mode: str, card: bytes) -> None:
    layout = KvLayout("test-model", 30, 3, 64, 16, "bfloat16")
    memory = mmap.mmap(-1, NUM_BLOCKS * layout.block_bytes)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    words = np.frombuffer(memory, dtype=np.uint32).reshape(NUM_BLOCKS, -1)
    transport = create_transport(
        "nixl",
        PoolRegion(address, len(memory), NUM_BLOCKS, layout),
        PeerIdentity(WorkerId("decode-0"), Epoch("d1")),
        b"secret",
        limits=MoverLimits(max_quarantined_ratio=1.0),
    )
    peer, _ = await transport.connect(card, nonce=NONCE)
    ids = list(range(NUM_BLOCKS))
    with contextlib.suppress(TransferTimeout):
        await transport.read(peer, ids, ids, timeout_s=0.3)
    if mode == "recycle":
        await transport.recycle()
        assert len(transport.settled()) == NUM_BLOCKS
    words[:] = 0
    print("> given up", flush=True)
    await asyncio.sleep(1.0)
    print("> late writes", int((words != 0).any(axis=1).sum()), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    allow_reads_over_tcp()
    asyncio.run(main(sys.argv[1], bytes.fromhex(sys.argv[2])))
