"""Engine settings: what one worker process computes, with how much memory, in what steps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from baton.core.errors import ConfigError
from baton.core.kv_layout import DTYPE_BYTES


class Device(Enum):
    """What the engine computes on."""

    CPU = "cpu"
    CUDA = "cuda"
    """NVIDIA GPUs through Triton kernels and CUDA graphs. Rank r of a tensor-parallel group takes
    the r-th visible device."""


class LoadFormat(Enum):
    """Where weights come from."""

    AUTO = "auto"
    """The safetensors files of the model folder."""
    DUMMY = "dummy"
    """Random numbers in the shapes of config.json, for benchmarks."""


KV_CACHE_DTYPES = ("auto", "fp8")
MAX_REVISION_CHARS = 64
DEFAULT_CPU_KV_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Checked at construction; the model's own limits are checked when it is loaded."""

    model_path: Path
    """A Hugging Face folder: config.json, *.safetensors, tokenizer.json."""
    dtype: str = "bfloat16"
    """Weights and KV. bfloat16 is the faster one on CPUs with AVX512-BF16 and equal elsewhere."""
    block_size: int = 16
    """Tokens per KV block. 16 on CPU: short prompts waste little; one block is 11 KiB per layer."""
    device: Device = Device.CPU
    tp_size: int = 1
    """Processes that share the model, one GPU each; heads and MLP columns are divided."""
    pool_per_rank: bool = False
    """A KV pool of its own for each rank of a CPU's group, with its KV heads alone, as GPUs always
    have. False lets the ranks of a CPU share one pool, which peers read with fewer copies."""
    rank_timeout_s: float = 30.0
    """With several ranks: a step that takes longer is taken for a rank that hangs, and the whole
    group ends, to be started again. Below the worker's health.step_timeout_s."""
    load_format: LoadFormat = LoadFormat.AUTO
    revision: str = ""
    """A word of the operator for what weights and settings do not show, such as software that
    computes other numbers. Workers with different words exchange no KV, and no answer goes on from
    one to the other."""
    kv_cache_dtype: str = "auto"
    """auto stores KV in `dtype`; fp8 in e4m3 with a scale per layer and KV head from the
    checkpoint (1 where it has none)."""
    kv_cache_bytes: int | None = None
    """Size of the KV pool of one rank. None: on a GPU what `gpu_memory_fraction` leaves after
    weights, graphs and activations have been measured; on a CPU 256 MiB of address space (11,600
    tokens of the default model in bfloat16), whose pages become resident when first written."""
    gpu_memory_fraction: float = 0.9
    """Share of a GPU's memory that the engine may use in all."""
    max_graph_batch_size: int = 256
    """Decode batches up to this size are replayed as CUDA graphs; 0 captures none."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None takes the model's own limit."""
    max_num_seqs: int = 32
    """Sequences computed in one step."""
    max_num_batched_tokens: int = 512
    """Token budget of one step; longer prompts are computed in chunks of what is left of it."""
    max_num_waiting: int = 1024
    """Sequences that may wait for blocks or a place in the step; more are refused as overload."""
    layer_notice_groups: int = 4
    """Into how many groups of layers a prompt's last chunk is divided for the worker that reads its
    KV while it is computed, each half as large as the one before; 0 announces whole blocks only."""
    layer_notice_min_tokens: int = 128
    """Last chunks of fewer tokens are announced whole."""
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
        if self.max_num_seqs < 1 or self.max_num_waiting < 1:
            raise ConfigError("max_num_seqs and max_num_waiting must be positive")
        if len(self.revision) > MAX_REVISION_CHARS or not self.revision.isprintable():
            raise ConfigError(
                f"revision must have at most {MAX_REVISION_CHARS} printable characters, "
                f"got {self.revision[:80]!r}"
            )
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 1:
            raise ConfigError(f"kv_cache_bytes must be positive, got {self.kv_cache_bytes}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} is not one of {list(KV_CACHE_DTYPES)}"
            )
        if not 0 <= self.layer_notice_groups <= 16 or self.layer_notice_min_tokens < 1:
            raise ConfigError(
                "layer_notice_groups must be 0 to 16 and layer_notice_min_tokens at least 1, got "
                f"{self.layer_notice_groups} and {self.layer_notice_min_tokens}"
            )
        if self.tp_size < 1:
            raise ConfigError(f"tp_size must be at least 1, got {self.tp_size}")
        if self.rank_timeout_s <= 0:
            raise ConfigError(f"rank_timeout_s must be positive, got {self.rank_timeout_s}")
        if not 0.05 <= self.gpu_memory_fraction <= 1.0:
            raise ConfigError(
                f"gpu_memory_fraction must be between 0.05 and 1, got {self.gpu_memory_fraction}"
            )
        if self.max_graph_batch_size < 0:
            raise ConfigError(
                f"max_graph_batch_size must not be negative, got {self.max_graph_batch_size}"
            )
