"""Real transports between pools of unequal blocks or ranks: every token where it belongs."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools

import numpy as np
import pytest

from baton.core.kv_layout import KvLayout
from kvtransfer.plan import RankPool

NONCE = b"nonce of the test"
SEED = 7
POISON = 0xFFFF
HEADS, LAYERS, NUM_TOKENS = 4, 3, 512


def layout_of(block_size: int) -> KvLayout:
    return KvLayout("test-model", LAYERS, HEADS, 64, block_size, "bfloat16")


CASES = {
    # owner: block size, rank, ranks; reader: the same.
    "equal": ((16, 0, 1), (16, 0, 1)),
    "larger blocks here": ((16, 0, 1), (64, 0, 1)),
    "smaller blocks here": ((64, 0, 1), (16, 0, 1)),
    "half of the heads there": ((16, 1, 2), (16, 0, 1)),
    "half of the heads here": ((16, 0, 1), (16, 1, 2)),
    "a quarter of half of them, larger blocks": ((16, 1, 2), (32, 3, 4)),
}


@pytest.mark.parametrize("case", CASES)
async def test_every_token_lands_in_its_place(
    kind, case, peers, make_pool, open_transport, token_pattern
):
    (there_size, there_rank, there_ranks), (here_size, here_rank, here_ranks) = CASES[case]
    peer = peers.start(
        kind,
        num_blocks=NUM_TOKENS // there_size,
        block_size=there_size,
        seed=SEED,
        heads=HEADS,
        layers=LAYERS,
        tp_rank=there_rank,
        tp_size=there_ranks,
        tokens=True,
    )
    layout = layout_of(here_size)
    rank = RankPool(layout, here_rank, here_ranks, NUM_TOKENS // here_size)
    pool = make_pool(kind, rank.num_blocks, layout)
    region = dataclasses.replace(
        pool.region, num_bytes=rank.num_bytes, tp_rank=here_rank, tp_size=here_ranks
    )
    transport = open_transport(kind, dataclasses.replace(pool, region=region))
    name, _ = await transport.connect(peer.card, nonce=NONCE)
    units = transport.units_per_block(name)
    assert min(units) == 1 and max(units) == max(there_size, here_size) // min(
        there_size, here_size
    )
    # Unit u of the owner goes to unit u of ours, so that a token keeps its number.
    moved = list(itertools.chain(range(3, 9), range(14, 11, -1)))
    stats = await transport.read(name, moved, moved, timeout_s=10)
    expected = np.full_like(token_pattern(rank, SEED), POISON)
    pattern = token_pattern(rank, SEED)
    owner = RankPool(layout_of(there_size), there_rank, there_ranks, NUM_TOKENS // there_size)
    heads = [h - rank.heads.start for h in rank.heads if h in owner.heads]
    unit_tokens = min(there_size, here_size)
    for unit in moved:
        block, first = divmod(unit * unit_tokens, here_size)
        part = np.s_[block, heads, :, :, first : first + unit_tokens]
        expected[part] = pattern[part]
    found = np.frombuffer(pool.memory, dtype=np.uint16, count=expected.size)
    assert (found.reshape(expected.shape) == expected).all()
    assert stats.num_bytes == int((expected != POISON).sum()) * 2


async def test_blocks_are_settled_whole_when_units_are_parts_of_them(
    kind, peers, make_pool, open_transport
):
    peer = peers.start(kind, num_blocks=32, block_size=16, heads=HEADS, layers=LAYERS)
    pool = make_pool(kind, 8, layout_of(64))
    transport = open_transport(kind, pool)
    await transport.connect(peer.card, nonce=NONCE)
    reading = asyncio.create_task(
        transport.read(peer.worker_id, range(6), range(8, 14), timeout_s=5)
    )
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    settled: list[int] = []
    async with asyncio.timeout(5):
        while len(settled) < 2:
            await asyncio.sleep(0.01)
            settled += transport.settled()
    assert settled == [2, 3]
