"""How much of a GPU's memory becomes KV blocks. Arithmetic over measured numbers only.

    budget = fraction * total
    KV     = budget - (what others hold + weights + activations + graphs)

Not known here: how the numbers are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import ConfigError

GIB = 1 << 30
GRAPH_BYTES = 3 << 20
"""Driver memory of one captured graph, beyond the memory its kernels share: nodes and
their parameters."""


@dataclass(frozen=True, slots=True)
class MemoryReadings:
    """Bytes on one GPU, each measured on it."""

    total: int
    used_before: int
    """Held before anything was loaded: other processes and the driver's context."""
    weights: int
    activations: int
    """Peak of a step of max_num_batched_tokens, and the buffers that stay for all steps."""
    graphs: int
    """Expected of the captured graphs."""


@dataclass(frozen=True, slots=True)
class KvDemand:
    """What one block costs and how many are the least that make sense."""

    block_bytes: int
    block_size: int
    max_model_len: int

    @property
    def min_blocks(self) -> int:
        """One sequence of the greatest length."""
        return -(-self.max_model_len // self.block_size)


def plan_kv_blocks(readings: MemoryReadings, demand: KvDemand, *, fraction: float) -> int:
    """Blocks that fit into `fraction` of the GPU. Raises ConfigError with the numbers if too few.

    Too few is less than one sequence of max_model_len: such a request would be accepted and could
    never run.
    """
    budget = int(readings.total * fraction)
    others = readings.used_before + readings.weights + readings.activations + readings.graphs
    left = budget - others
    num_blocks = max(left, 0) // demand.block_bytes
    if num_blocks >= demand.min_blocks:
        return num_blocks
    raise ConfigError(_refusal(readings, demand, fraction, left, num_blocks))


def _refusal(
    readings: MemoryReadings, demand: KvDemand, fraction: float, left: int, num_blocks: int
) -> str:
    needed = demand.min_blocks * demand.block_bytes
    parts = (
        f"{_gib(readings.total)} GiB of GPU memory, {fraction:g} of it to be used: "
        f"weights {_gib(readings.weights)}, activations {_gib(readings.activations)}, "
        f"graphs {_gib(readings.graphs)}, held by others {_gib(readings.used_before)} GiB"
    )
    if left < demand.block_bytes:
        return (
            f"the model does not fit: {parts}; {_gib(-min(left, 0))} GiB are missing before the "
            "first KV block. Raise tp_size, take a quantised model, or lower "
            "max_num_batched_tokens"
        )
    fitting = num_blocks * demand.block_size
    return (
        f"the KV pool does not hold one sequence of max_model_len {demand.max_model_len}: it "
        f"needs {_gib(needed)} GiB and {_gib(left)} are left ({parts}). What would fit: "
        f"max_model_len {fitting}; or raise tp_size or gpu_memory_fraction, or set "
        "kv_cache_dtype fp8"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
