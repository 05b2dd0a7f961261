"""The row order of query and key projections, against the rotation it exists for."""

from __future__ import annotations

import numpy as np
import pytest

from baton.core.errors import ConfigError
from baton.model_import.architectures import LLAMA, pairs_to_halves


def rotate(vector: np.ndarray, position: int, partner: list[tuple[int, int]]) -> np.ndarray:
    """RoPE with the given pairs of elements; pair i turns by position / 100**(i / pairs)."""
    turned = vector.copy()
    for i, (a, b) in enumerate(partner):
        angle = position / 100 ** (i / len(partner))
        turned[a] = vector[a] * np.cos(angle) - vector[b] * np.sin(angle)
        turned[b] = vector[a] * np.sin(angle) + vector[b] * np.cos(angle)
    return turned


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 4), (3, 2), (9, 64), (4, 80)])
def test_scores_are_the_same_after_reordering(num_heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(num_heads)
    hidden = 6
    query, key = rng.standard_normal((2, num_heads * head_dim, hidden))
    x, y = rng.standard_normal((2, hidden))
    side_by_side = [(2 * i, 2 * i + 1) for i in range(head_dim // 2)]
    half_apart = [(i, i + head_dim // 2) for i in range(head_dim // 2)]

    def scores(q: np.ndarray, k: np.ndarray, pairs: list[tuple[int, int]]) -> list[float]:
        q_heads, k_heads = (q @ x).reshape(num_heads, -1), (k @ y).reshape(num_heads, -1)
        return [
            float(rotate(a, 5, pairs) @ rotate(b, 3, pairs))
            for a, b in zip(q_heads, k_heads, strict=True)
        ]

    reordered = scores(
        pairs_to_halves(query, num_heads), pairs_to_halves(key, num_heads), half_apart
    )
    np.testing.assert_allclose(reordered, scores(query, key, side_by_side), rtol=1e-9)


def test_biases_are_reordered_like_rows() -> None:
    bias = np.arange(8.0)
    np.testing.assert_array_equal(pairs_to_halves(bias, 2), [0, 2, 1, 3, 4, 6, 5, 7])


def test_names_of_biases_follow_their_module() -> None:
    assert LLAMA.target_name("blk.12.attn_q.bias") == "model.layers.12.self_attn.q_proj.bias"
    assert LLAMA.target_name("output.weight") == "lm_head.weight"
    for name in ("blk.1.attn_q", "blk.attn_q.weight", "vision.weight"):
        with pytest.raises(ConfigError, match="unknown for this architecture"):
            LLAMA.target_name(name)
