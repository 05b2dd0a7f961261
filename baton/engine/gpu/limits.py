"""What the kernels serve, checked before weights are read. Numbers only."""

from __future__ import annotations

from baton.core.errors import ConfigError
from baton.engine.config import EngineConfig
from baton.engine.model_config import ModelConfig
from kernels.attention_arguments import MAX_BLOCK_SIZE, MAX_GROUP, MAX_HEAD_DIM
from kernels.decode_attention import MAX_SEQS
from kernels.sampling_rows import MAX_VOCAB_SIZE

MIN_HEAD_DIM = 16


def check_gpu_limits(model: ModelConfig, config: EngineConfig) -> None:
    """Raises ConfigError naming the value and the limit."""
    head_dim = model.head_dim
    if head_dim % 2 or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ConfigError(
            f"head_dim {head_dim} is not an even number from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, "
            "which the GPU kernels serve; use device cpu"
        )
    if model.group_size > MAX_GROUP:
        raise ConfigError(
            f"{model.group_size} query heads share a KV head and the GPU kernels serve "
            f"{MAX_GROUP}; use device cpu"
        )
    _check_most("block_size", config.block_size, MAX_BLOCK_SIZE)
    _check_most("max_num_seqs", config.max_num_seqs, MAX_SEQS)
    if model.vocab_size > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"vocab_size {model.vocab_size} is above {MAX_VOCAB_SIZE}, the most that sampling on "
            "a GPU serves; use device cpu"
        )


def _check_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ConfigError(f"{name} {value} is above {limit}, the most on a GPU; lower it")
