"""The formulas against numbers worked out by hand for a model small enough to count."""

from __future__ import annotations

import itertools

import pytest

from baton.model_info import formulas
from baton.model_info.formulas import Bound, CostModel

# 2 layers, 2 heads and 1 KV head of 4, hidden 8, MLP 16, vocabulary 10, two bytes an element.
# Attention of a layer: q 8x8, k and v 4x8 each, o 8x8 = 192; MLP: 3 x 16 x 8 = 384.
TINY = CostModel(
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    layer_matmul_params=2 * (192 + 384),
    head_params=80,
    # Norms of 8: two a layer and the last one.
    weight_bytes_per_step=(1152 + 80 + 5 * 8) * 2,
    dtype_bytes=2,
)


def test_kv_of_a_token_is_one_key_and_value_per_layer_and_kv_head() -> None:
    assert formulas.kv_bytes_per_token(TINY) == 2 * 2 * 1 * 4 * 2


def test_attention_multiplies_head_dim_twice_per_attended_token() -> None:
    # 2 layers x 2 heads x (4 scores + 4 sums) multiply-adds for one attended token.
    assert formulas.attention_flops(TINY, 1) == 2 * (2 * 2 * 8)
    assert formulas.attention_flops(TINY, 10) == 640


def test_decode_counts_projections_head_and_attention() -> None:
    assert formulas.decode_flops(TINY, 10) == 2 * 1152 + 2 * 80 + 640


def test_prefill_attends_to_a_triangle_and_needs_logits_once() -> None:
    # Tokens attend to 1 + 2 + 3 = 6 tokens in all.
    assert formulas.prefill_flops(TINY, 3) == 3 * 2 * 1152 + 160 + 6 * 64


def test_prompt_of_one_token_costs_what_decoding_it_costs() -> None:
    assert formulas.prefill_flops(TINY, 1) == formulas.decode_flops(TINY, 1)


def test_step_reads_the_weights_once_and_each_context() -> None:
    weights = (1152 + 80 + 40) * 2
    assert formulas.decode_step_bytes(TINY, 3, 10) == weights + 3 * 11 * 32
    assert formulas.prefill_bytes(TINY, 5) == weights + 2 * 5 * 32


def test_roofline_takes_the_slower_limit() -> None:
    # 3104 FLOPs and 2896 bytes a step: a fast memory leaves the arithmetic as the limit.
    slow_memory = formulas.decode_estimate(TINY, 1, 10, flops_per_s=1e9, bytes_per_s=2896)
    assert slow_memory.bound is Bound.MEMORY
    assert slow_memory.seconds == pytest.approx(1.0)
    assert slow_memory.tokens_per_s == pytest.approx(1.0)
    slow_arithmetic = formulas.decode_estimate(TINY, 2, 10, flops_per_s=3104, bytes_per_s=1e9)
    assert slow_arithmetic.bound is Bound.COMPUTE
    assert slow_arithmetic.seconds == pytest.approx(2.0)
    assert slow_arithmetic.tokens_per_s == pytest.approx(1.0)


def test_prefill_rate_counts_prompt_tokens() -> None:
    flops = formulas.prefill_flops(TINY, 100)
    estimate = formulas.prefill_estimate(TINY, 100, flops_per_s=flops / 4, bytes_per_s=1e12)
    assert estimate.seconds == pytest.approx(4.0)
    assert estimate.tokens_per_s == pytest.approx(25.0)


def test_larger_batches_never_decode_slower_in_all() -> None:
    rates = [
        formulas.decode_estimate(TINY, n, 64, flops_per_s=1e6, bytes_per_s=1e6).tokens_per_s
        for n in range(1, 64)
    ]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(rates))
