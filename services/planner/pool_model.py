"""What one worker of a size can do: seconds of its steps, room for KV, seconds to start.

Either predicted from the limits of a machine (`predict`), or read from a file of measured figures
(`profile_file.py`).

    step  fixed + token * computed + pair * (computed x tokens before each)
          + sequence * decoding + kv_token * KV that decoding sequences read

Does not know: requests, pools, clocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.errors import ConfigError
from baton.model_info.formulas import FLOPS_PER_MULTIPLY_ADD, CostModel, kv_bytes_per_token
from baton.model_info.machines import Machine
from baton.simulator.hardware import Hardware

MEMORY_SHARE = 0.9
"""Of a device, for weights and KV; the rest is workspace, graphs and what fragments."""
NUM_REDUCTIONS_PER_LAYER = 2
"""Sums over the ranks of a group: after attention and after the MLP."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a machine's peaks that an engine reaches, and what it adds.

    The defaults are what this engine reaches on an H200 with a model of 8 billion parameters
    (docs/gpu.md); another engine or card has others.
    """

    compute: float = 0.70
    attention: float = 0.55
    bandwidth: float = 0.85
    step_s: float = 0.0003
    """Between the kernels of two steps."""
    sequence_s: float = 5e-6
    """Per sequence of a step, beside its products: sampling, its row of everything."""
    reduction_s: float = 12e-6
    """One small sum over the ranks of a tensor-parallel group."""

    def __post_init__(self) -> None:
        for name in ("compute", "attention", "bandwidth"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(
                    f"efficiency.{name} must be above 0 and at most 1, got {getattr(self, name):g}"
                )
        for name in ("step_s", "sequence_s", "reduction_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"efficiency.{name} must not be negative, got {getattr(self, name):g}"
                )


@dataclass(frozen=True, slots=True)
class PoolModel:
    """One worker of `tensor_parallel` devices."""

    tensor_parallel: int
    hardware: Hardware
    max_kv_tokens: int
    """Of KV that fit beside the weights."""
    start_s: float
    """From the decision until it takes requests."""
    source: str
    """Where the figures come from."""

    def __post_init__(self) -> None:
        if self.tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.max_kv_tokens < 1:
            raise ConfigError(f"no room for KV: {self.max_kv_tokens} tokens; use more devices")
        if self.start_s < 0:
            raise ConfigError(f"start_s must not be negative, got {self.start_s:g}")


def predict(
    model: CostModel,
    machine: Machine,
    tensor_parallel: int,
    *,
    dtype: str,
    efficiency: Efficiency | None = None,
    start_s: float = 60.0,
) -> PoolModel:
    """From the limits of `machine`, which is one device.

    Raises ConfigError when heads do not divide, figures of the machine are missing, or weights
    leave no room for KV; the message says how many devices would do.
    """
    check_divides(model, tensor_parallel)
    efficiency = efficiency or Efficiency()
    if machine.memory_bytes is None or machine.link_bytes_per_s is None:
        raise ConfigError(f"machine {machine.name} has no figures for memory and links")
    return PoolModel(
        tensor_parallel,
        _hardware(model, machine, tensor_parallel, dtype, efficiency),
        _kv_tokens(model, machine.memory_bytes, tensor_parallel, machine.name),
        start_s,
        f"roofline of {machine.name} ({machine.source})",
    )


def check_divides(model: CostModel, tensor_parallel: int) -> None:
    """Raises ConfigError; KV heads may be fewer than ranks when they divide them."""
    fewer, more = sorted((model.num_kv_heads, tensor_parallel))
    if model.num_heads % tensor_parallel or more % fewer:
        raise ConfigError(
            f"tensor_parallel={tensor_parallel} does not divide {model.num_heads} attention heads "
            f"and {model.num_kv_heads} KV heads; choose a common divisor"
        )


def _hardware(
    model: CostModel, machine: Machine, ranks: int, dtype: str, efficiency: Efficiency
) -> Hardware:
    flops_per_s = machine.flops_for(dtype) * ranks
    bytes_per_s = machine.bytes_per_s * ranks * efficiency.bandwidth
    assert machine.link_bytes_per_s is not None
    multiply_add_s = FLOPS_PER_MULTIPLY_ADD / (flops_per_s * efficiency.compute)
    # Scores and weighted sum, of every head in every layer.
    pair_flops = FLOPS_PER_MULTIPLY_ADD * 2 * model.num_heads * model.head_dim * model.num_layers
    num_sums = NUM_REDUCTIONS_PER_LAYER * model.num_layers if ranks > 1 else 0
    hidden_bytes = model.num_heads * model.head_dim * model.dtype_bytes
    sum_token_s = num_sums * hidden_bytes / machine.link_bytes_per_s
    token_s = model.layer_matmul_params * multiply_add_s + sum_token_s
    weights_s = model.weight_bytes_per_step / bytes_per_s
    return Hardware(
        step_fixed_s=efficiency.step_s + weights_s + num_sums * efficiency.reduction_s,
        prefill_token_s=token_s,
        prefill_pair_s=pair_flops / (flops_per_s * efficiency.attention),
        decode_sequence_s=token_s + model.head_params * multiply_add_s + efficiency.sequence_s,
        decode_kv_token_s=kv_bytes_per_token(model) / bytes_per_s,
        link_bytes_per_second=machine.link_bytes_per_s,
    )


def _kv_tokens(model: CostModel, memory_bytes: float, ranks: int, name: str) -> int:
    # A head that ranks share lies on each of them.
    copies = max(1, ranks // model.num_kv_heads)
    room = memory_bytes * MEMORY_SHARE * ranks - model.weight_bytes_per_step
    tokens = int(room // (kv_bytes_per_token(model) * copies))
    if tokens < 1:
        needed = int(model.weight_bytes_per_step // (memory_bytes * MEMORY_SHARE)) + 1
        raise ConfigError(
            f"weights of {model.weight_bytes_per_step / 1e9:.1f} GB leave no room for KV on "
            f"{ranks} x {name} of {memory_bytes / 1e9:.0f} GB; take at least {needed} devices"
        )
    return tokens
