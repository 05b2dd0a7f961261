"""A reader on GPU 0 of what this process sees: `gpu_reader_child.py read|open HEADS NUM_TOKENS`.

read: prints "nonce HEX", takes the card of an owner in hex from its input, reads all of its blocks
and says what arrived. open: makes the transport alone, and says why it cannot.
"""

from __future__ import annotations

import asyncio
import secrets
import sys

import numpy as np
import torch

from baton.core.block import BlockId
from baton.core.errors import TransferError
from baton.core.worker_info import Epoch, WorkerId
from kvtransfer.metadata import PeerIdentity
from kvtransfer.mover_transport import MoverTransport
from kvtransfer.plan import RankPool
from kvtransfer.select import create_transport
from mapped_files import SECRET, as_blocks, layout_of, region_of, token_pattern

BLOCK_SIZE, NUM_SCRATCH = 64, 2


def main() -> None:
    mode, heads, num_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    num_blocks = num_tokens // BLOCK_SIZE
    pool = RankPool(layout_of(heads, BLOCK_SIZE), 0, 1, num_blocks + NUM_SCRATCH)
    memory = torch.zeros(pool.num_bytes // 2, dtype=torch.int16, device="cuda:0")
    region = region_of(pool, memory.data_ptr(), device_id=0, num_scratch_blocks=NUM_SCRATCH)
    identity = PeerIdentity(WorkerId("d"), Epoch("e2"))
    try:
        transport = create_transport("mapped", region, identity, SECRET)
    except TransferError as error:
        print(error)
        return
    if mode == "read":
        asyncio.run(read_all(transport, num_blocks))
        expected = as_blocks(token_pattern(pool, num_tokens), pool).ravel()
        found = memory.cpu().numpy().view(np.uint16)[: expected.size]
        print("all tokens arrived" if np.array_equal(found, expected) else "wrong tokens arrived")


async def read_all(transport: MoverTransport, num_blocks: int) -> None:
    nonce = secrets.token_bytes(16)
    print(f"nonce {nonce.hex()}", flush=True)
    name, _ = await transport.connect(bytes.fromhex(sys.stdin.readline()), nonce=nonce)
    blocks = [BlockId(block) for block in range(num_blocks)]
    await transport.read(name, blocks, blocks, timeout_s=10.0)
    await transport.close()


if __name__ == "__main__":
    main()
