"""Engine settings: what one worker process computes, with how much memory, in what steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import ConfigError
from baton.core.kv_layout import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Checked at construction; the model's own limits are checked when it is loaded."""

    model_path: Path
    """A Hugging Face folder: config.json, *.safetensors, tokenizer.json."""
    dtype: str = "bfloat16"
    """Weights and KV. bfloat16 is the faster one on CPUs with AVX512-BF16 and equal elsewhere."""
    block_size: int = 16
    """Tokens per KV block. 16 on CPU: short prompts waste little; one block is 11 KiB per layer."""
    kv_cache_bytes: int = 256 << 20
    """Address space of the KV pool: 11,600 tokens of the default model in bfloat16. Pages become
    resident when first written."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None takes the model's own limit."""
    max_num_seqs: int = 32
    """Sequences computed in one step."""
    max_num_batched_tokens: int = 512
    """Token budget of one step; longer prompts are computed in chunks of what is left of it."""
    max_num_waiting: int = 1024
    """Sequences that may wait for blocks or a place in the step; more are refused as overload."""
    num_threads: int | None = None
    """Threads of the tensor library. None takes the cores this process may use, in a worker divided
    among the workers of the host that compute at the time."""
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size must be a power of two, got {self.block_size}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs "
                f"{self.max_num_seqs}: a full decode batch would not fit in one step; raise it"
            )
        if self.max_num_seqs < 1 or self.kv_cache_bytes < 1 or self.max_num_waiting < 1:
            raise ConfigError("max_num_seqs, max_num_waiting and kv_cache_bytes must be positive")
