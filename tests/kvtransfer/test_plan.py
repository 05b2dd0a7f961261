"""Runs of consecutive ids, id checks, and what each rank reads from which other one."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from baton.core.block import BlockId
from baton.core.errors import IncompatiblePeer, TransferError
from baton.core.kv_layout import KvLayout
from kvtransfer.plan import (
    BlockIds,
    Copy,
    PairPlan,
    RankPool,
    Run,
    SidePlan,
    checked_ids,
    count_runs,
    heads_of_rank,
    layer_units,
    merge_runs,
    plan_pair,
    plan_sources,
)


def test_runs_are_consecutive_on_both_sides():
    remote = checked_ids([4, 5, 6, 9], 10, "a")
    local = checked_ids([0, 1, 2, 7], 10, "b")
    assert merge_runs(remote, local) == [Run(4, 0, 3), Run(9, 7, 1)]
    assert merge_runs(remote[:0], local[:0]) == []
    assert len(merge_runs(remote, checked_ids([3, 2, 1, 0], 10, "b"))) == 4
    assert count_runs(remote[:0], local[:0]) == 0


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_every_pair_once_and_are_maximal(seed):
    rng = random.Random(seed)
    pairs, r, q = [], 0, 500
    for _ in range(rng.randrange(1, 60)):
        r, q = r + rng.choice([1, 1, 2]), q + rng.choice([1, 1, 3])
        pairs.append((r, q))
    remote = checked_ids([BlockId(a) for a, _ in pairs], 1000, "a")
    local = checked_ids([BlockId(b) for _, b in pairs], 1000, "b")
    runs = merge_runs(remote, local)
    assert count_runs(remote, local) == len(runs)
    assert [(x.remote + i, x.local + i) for x in runs for i in range(x.num_blocks)] == pairs
    for a, b in itertools.pairwise(runs):
        assert (a.remote + a.num_blocks, a.local + a.num_blocks) != (b.remote, b.local)


@pytest.mark.parametrize("bad", [-1, 8, 2**31, 2**40])
def test_ids_outside_the_pool_are_refused(bad):
    with pytest.raises(TransferError, match=f"block id {bad} is outside p's pool of 8 blocks"):
        checked_ids([BlockId(0), BlockId(bad)], 8, "p's")


SIZES = (1, 2, 4, 8)
BLOCK_SIZES = ((16, 16), (16, 64), (64, 16))
NUM_TOKENS = 192
"""Of every pool: whole blocks of 16 and of 64."""
LAYERS, HEAD_DIM = 2, 2


def sizes_for(num_heads: int) -> list[int]:
    return [size for size in SIZES if num_heads % size == 0 or size % num_heads == 0]


def layout_of(num_heads: int, block_size: int) -> KvLayout:
    return KvLayout("m", LAYERS, num_heads, HEAD_DIM, block_size, "bfloat16")


def rank_pool(num_heads: int, block_size: int, rank: int, size: int) -> RankPool:
    return RankPool(layout_of(num_heads, block_size), rank, size, NUM_TOKENS // block_size)


def kv_of_all_tokens(num_heads: int) -> NDArray[np.uint16]:
    """[tokens, heads, layers, 2, head_dim], no number twice and none 0."""
    shape = (NUM_TOKENS, num_heads, LAYERS, 2, HEAD_DIM)
    assert np.prod(shape) < 2**16
    return np.arange(1, np.prod(shape) + 1, dtype=np.uint16).reshape(shape)


def pool_of(kv: NDArray[np.uint16], pool: RankPool) -> NDArray[np.uint8]:
    """The rank's memory [blocks, heads, layers, 2, block_size, head_dim], as bytes."""
    held = kv[:, list(pool.heads)]
    blocks = held.reshape(pool.num_blocks, pool.layout.block_size, *held.shape[1:])
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1, 5)).reshape(-1).view(np.uint8)


def move(
    plan: PairPlan,
    source: NDArray[np.uint8],
    target: NDArray[np.uint8],
    written: NDArray[np.int8],
    units: tuple[BlockIds, BlockIds],
) -> int:
    """Copy byte by byte as planned; returns how many."""
    moved = 0
    for copy in plan.copies(*units):
        there = slice(copy.remote, copy.remote + copy.num_bytes)
        here = slice(copy.local, copy.local + copy.num_bytes)
        target[here] = source[there]
        written[here] += 1
        moved += copy.num_bytes
    return moved


@pytest.mark.parametrize("block_sizes", BLOCK_SIZES, ids=lambda sizes: f"{sizes[0]}-{sizes[1]}")
@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 8])
def test_every_byte_is_read_once_from_a_rank_that_has_it(num_heads, block_sizes):
    """All pairs of group sizes; unit u of the remote goes to a random unit of the local."""
    rng = np.random.default_rng(num_heads)
    kv = kv_of_all_tokens(num_heads)
    num_units = NUM_TOKENS // min(block_sizes)
    for remote_size, local_size in itertools.product(sizes_for(num_heads), repeat=2):
        remotes = [rank_pool(num_heads, block_sizes[0], r, remote_size) for r in range(remote_size)]
        sources = [pool_of(kv, remote) for remote in remotes]
        chosen = rng.permutation(num_units)[: num_units - 1].astype(np.int32)
        places = rng.permutation(num_units)[: num_units - 1].astype(np.int32)
        arrived = np.zeros_like(kv).reshape(num_units, -1)
        arrived[places] = kv.reshape(num_units, -1)[chosen]
        for rank in range(local_size):
            local = rank_pool(num_heads, block_sizes[1], rank, local_size)
            target = np.zeros(local.num_bytes, dtype=np.uint8)
            written = np.zeros(local.num_bytes, dtype=np.int8)
            moved = sum(
                move(plan, source, target, written, (chosen, places))
                for remote, source in zip(remotes, sources, strict=True)
                if (plan := plan_pair(remote, local)) is not None
            )
            np.testing.assert_array_equal(target, pool_of(arrived.reshape(kv.shape), local))
            assert written.max() == 1
            assert moved == written.sum() == local.num_bytes * (num_units - 1) // num_units


@pytest.mark.parametrize("block_sizes", BLOCK_SIZES, ids=lambda sizes: f"{sizes[0]}-{sizes[1]}")
@pytest.mark.parametrize("num_heads", [1, 3, 8])
def test_layers_of_units_are_exactly_their_part_of_them(num_heads, block_sizes):
    """Layer by layer the same bytes arrive in the same places, each once."""
    rng = np.random.default_rng(num_heads)
    kv = kv_of_all_tokens(num_heads)
    num_units = NUM_TOKENS // min(block_sizes)
    for remote_size, local_size in itertools.product(sizes_for(num_heads), repeat=2):
        local = rank_pool(num_heads, block_sizes[1], local_size - 1, local_size)
        chosen = rng.permutation(num_units)[:5].astype(np.int32)
        places = rng.permutation(num_units)[:5].astype(np.int32)
        for rank in range(remote_size):
            remote = rank_pool(num_heads, block_sizes[0], rank, remote_size)
            whole, layered = (plan_pair(remote, local, by_layer=is_so) for is_so in (False, True))
            assert (whole is None) == (layered is None)
            if whole is None or layered is None:
                continue
            source = pool_of(kv, remote)
            expected, target = (np.zeros(local.num_bytes, dtype=np.uint8) for _ in range(2))
            written, once = (np.zeros(local.num_bytes, dtype=np.int8) for _ in range(2))
            move(whole, source, expected, once, (chosen, places))
            for layer in range(LAYERS):
                units = [layer_units(u, range(layer, layer + 1), LAYERS) for u in (chosen, places)]
                part = np.zeros_like(written)
                moved = move(layered, source, target, part, (units[0], units[1]))
                assert moved == part.sum() == 5 * whole.local.unit_bytes // LAYERS
                written += part
            np.testing.assert_array_equal(target, expected)
            np.testing.assert_array_equal(written, once)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 8])
def test_readers_spread_over_the_ranks_that_hold_a_head(num_heads):
    for remote_size, local_size in itertools.product(sizes_for(num_heads), repeat=2):
        load: Counter[tuple[int, int]] = Counter()
        for rank in range(local_size):
            sources = plan_sources(remote_size, rank, local_size, num_heads)
            taken = [head for heads in sources.values() for head in heads]
            assert taken == list(heads_of_rank(num_heads, rank, local_size))
            load.update((owner, head) for owner, heads in sources.items() for head in heads)
        readers = max(1, local_size // num_heads)
        owners = max(1, remote_size // num_heads)
        assert max(load.values()) == -(-readers // owners)


def test_equal_pools_move_whole_blocks_in_runs():
    pool = rank_pool(8, 16, 1, 2)
    plan = plan_pair(pool, pool)
    assert plan is not None
    assert plan.is_whole_blocks
    size = pool.block_bytes
    ids = (np.array([4, 5, 6, 9], np.int32), np.array([0, 1, 2, 7], np.int32))
    assert plan.copies(*ids) == [Copy(4 * size, 0, 3 * size), Copy(9 * size, 7 * size, size)]
    assert plan.copies(ids[0][:0], ids[1][:0]) == []
    assert plan_pair(rank_pool(8, 16, 0, 2), pool) is None


def test_a_share_of_the_heads_is_one_slice_of_each_block():
    plan = plan_pair(rank_pool(8, 16, 0, 2), rank_pool(8, 16, 1, 4))
    assert plan is not None
    head_bytes = layout_of(8, 16).head_bytes
    assert plan.remote.offsets.tolist() == [[2 * head_bytes]]
    assert plan.local.offsets.tolist() == [[0]]
    assert plan.local.piece_bytes == 2 * head_bytes
    assert not plan.is_whole_blocks
    assert plan.local.unit_bytes == plan.remote.unit_bytes == 2 * head_bytes


@pytest.mark.parametrize(("remote", "local", "units"), [(16, 64, (1, 4)), (64, 16, (4, 1))])
def test_units_have_the_tokens_of_the_smaller_block(remote, local, units):
    plan = plan_pair(rank_pool(2, remote, 0, 1), rank_pool(2, local, 0, 1))
    assert plan is not None
    assert (plan.remote.units_per_block, plan.local.units_per_block) == units
    assert plan.remote.num_units == plan.local.num_units == NUM_TOKENS // 16
    assert plan.local.piece_bytes == 16 * HEAD_DIM * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_id": "n"}, "model_id: m here, n there"),
        ({"num_layers": 3}, "num_layers: 2 here, 3 there"),
        ({"num_kv_heads": 8}, "num_kv_heads: 4 here, 8 there"),
        ({"head_dim": 4}, "head_dim: 2 here, 4 there"),
        ({"dtype": "float16"}, "dtype: bfloat16 here, float16 there"),
        ({"block_size": 24}, "block_size: 16 here, 24 there; take equal ones or a multiple"),
    ],
)
def test_pools_that_do_not_fit_are_refused(changes, reason):
    local = rank_pool(4, 16, 0, 1)
    remote = RankPool(replace(layout_of(4, 16), **changes), 0, 1, 4)
    with pytest.raises(IncompatiblePeer, match=reason):
        plan_pair(remote, local)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((-1, 2, 4), "tp_rank -1 of 2 ranks"),
        ((2, 2, 4), "tp_rank 2 of 2 ranks"),
        ((0, 0, 4), "tp_rank 0 of 0 ranks"),
        ((0, 1 << 30, 4), "at most 64 are allowed"),
        ((0, 3, 4), "4 KV heads cannot lie on 3 ranks; take a divisor or a multiple of 4"),
        ((0, 2, 0), "a pool of 0 blocks"),
        ((0, 2, 1 << 31), "a pool of 2147483648 blocks"),
    ],
)
def test_impossible_ranks_are_refused(values, reason):
    with pytest.raises(IncompatiblePeer, match=re.escape(reason)):
        RankPool(layout_of(4, 16), *values)


def test_pieces_outside_their_block_are_refused():
    with pytest.raises(TransferError, match="pieces of bytes 8 to 24 leave their block of 16"):
        SidePlan(4, 16, np.array([[8]], dtype=np.int64), 16)
