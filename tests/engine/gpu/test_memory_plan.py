"""What becomes KV blocks, and what a refusal says."""

from __future__ import annotations

import pytest

from baton.core.errors import ConfigError
from baton.engine.gpu.measure import (
    decode_counts,
    expected_graph_bytes,
    largest_step,
    num_blocks_of,
)
from baton.engine.gpu.memory_plan import GIB, GRAPH_BYTES, KvDemand, MemoryReadings, plan_kv_blocks

READINGS = MemoryReadings(
    total=140 * GIB, used_before=1 * GIB, weights=15 * GIB, activations=2 * GIB, graphs=1 * GIB
)
DEMAND = KvDemand(block_bytes=8 << 20, block_size=64, max_model_len=131072)


def test_what_is_left_of_the_budget_becomes_blocks() -> None:
    num_blocks = plan_kv_blocks(READINGS, DEMAND, fraction=0.9)
    assert num_blocks == (126 - 19) * GIB // (8 << 20)


def test_blocks_never_exceed_the_budget_over_many_sizes() -> None:
    for fraction in (0.2, 0.5, 0.83, 1.0):
        for block_bytes in (1 << 20, 3 << 20, (5 << 20) + 7):
            demand = KvDemand(block_bytes, 16, 16)
            num_blocks = plan_kv_blocks(READINGS, demand, fraction=fraction)
            spent = 19 * GIB + num_blocks * block_bytes
            assert spent <= fraction * 140 * GIB < spent + block_bytes


def test_a_model_too_large_is_refused_with_what_is_missing() -> None:
    readings = MemoryReadings(80 * GIB, 1 * GIB, 131 * GIB, 2 * GIB, 1 * GIB)
    with pytest.raises(ConfigError, match=r"weights 131\.00.*63\.00 GiB are missing.*tp_size"):
        plan_kv_blocks(readings, DEMAND, fraction=0.9)


def test_a_pool_below_one_longest_sequence_is_refused_with_the_length_that_fits() -> None:
    readings = MemoryReadings(24 * GIB, 0, 15 * GIB, 1 * GIB, 0)
    with pytest.raises(ConfigError, match=r"max_model_len 131072: it needs 16\.00 GiB") as caught:
        plan_kv_blocks(readings, DEMAND, fraction=0.9)
    fitting = 64 * int(5.6 * GIB // (8 << 20))
    assert f"max_model_len {fitting}" in str(caught.value)
    assert plan_kv_blocks(readings, KvDemand(8 << 20, 64, fitting), fraction=0.9) == fitting // 64


@pytest.mark.parametrize(
    ("max_num_tokens", "max_num_seqs", "max_model_len"),
    [(8192, 256, 131072), (512, 32, 128), (64, 64, 32), (1, 1, 1), (100, 3, 7)],
)
def test_the_measured_step_is_as_large_as_a_step_can_be(
    max_num_tokens: int, max_num_seqs: int, max_model_len: int
) -> None:
    slices = largest_step(
        max_num_tokens=max_num_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        block_size=16,
    )
    lengths = [len(s.token_ids) for s in slices]
    assert sum(lengths) == min(max_num_tokens, max_num_seqs * max_model_len)
    assert len(lengths) == max_num_seqs
    assert max(lengths) <= max_model_len
    tables = [block for s in slices for block in s.block_table]
    assert sorted(tables) == list(range(num_blocks_of(slices)))
    assert all(len(s.block_table) == -(-len(s.token_ids) // 16) for s in slices)


def test_graphs_share_the_memory_of_the_largest() -> None:
    assert expected_graph_bytes(1 << 30, 8192, [], [], 1000) == 0
    expected = (1 << 30) * 256 // 8192 + 256 * 1000 + 3 * GRAPH_BYTES
    assert expected_graph_bytes(1 << 30, 8192, [1, 64, 256], [], 1000) == expected
    expected = (1 << 30) * 512 // 8192 + 256 * 1000 + 5 * GRAPH_BYTES
    assert expected_graph_bytes(1 << 30, 8192, [1, 64, 256], [16, 512], 1000) == expected


@pytest.mark.parametrize(
    ("most", "counts"), [(1, []), (2, [1]), (3, [1, 2]), (64, [1, 2, 4, 8, 16, 32])]
)
def test_mixed_steps_are_warmed_for_every_power_of_two(most: int, counts: list[int]) -> None:
    assert decode_counts(most) == counts
