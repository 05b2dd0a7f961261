"""Published shapes of well-known models, for planning before any weights are at hand.

Sources: the config.json of each model's own repository; OPT: Zhang et al. 2022,
https://arxiv.org/abs/2205.01068 table 1.
"""

from __future__ import annotations

from baton.core.errors import ConfigError
from baton.model_info.formulas import CostModel

HALF_BYTES = 2


def _shape(
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    num_mlp_matrices: int = 3,
) -> CostModel:
    """A dense decoder in 16 bits; the MLP has two matrices, or three when it is gated."""
    hidden = heads * head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * head_dim
    matmul = layers * (attention + num_mlp_matrices * hidden * intermediate)
    head = vocab * hidden
    return CostModel(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layer_matmul_params=matmul,
        head_params=head,
        weight_bytes_per_step=(matmul + head) * HALF_BYTES,
        dtype_bytes=HALF_BYTES,
    )


SHAPES = {
    "llama-3.2-1b": _shape(
        layers=16, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocab=128256
    ),
    "llama-2-7b": _shape(
        layers=32, heads=32, kv_heads=32, head_dim=128, intermediate=11008, vocab=32000
    ),
    "llama-3.1-8b": _shape(
        layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocab=128256
    ),
    "opt-13b": _shape(
        layers=40, heads=40, kv_heads=40, head_dim=128, intermediate=20480, vocab=50272,
        num_mlp_matrices=2,
    ),
    "opt-66b": _shape(
        layers=64, heads=72, kv_heads=72, head_dim=128, intermediate=36864, vocab=50272,
        num_mlp_matrices=2,
    ),
    "llama-3.1-70b": _shape(
        layers=80, heads=64, kv_heads=8, head_dim=128, intermediate=28672, vocab=128256
    ),
}  # fmt: skip


def find_shape(name: str) -> CostModel:
    """Raises ConfigError listing what there is."""
    if name not in SHAPES:
        raise ConfigError(f"unknown model shape {name!r}; known: {', '.join(SHAPES)}")
    return SHAPES[name]
