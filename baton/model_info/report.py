"""Everything `baton model info` tells, as one value. Printing is the command's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import ConfigError
from baton.core.kv_layout import DTYPE_BYTES
from baton.core.quantization import weight_scheme
from baton.model_info import formulas
from baton.model_info.folder import Component, ModelShape, read_shape
from baton.model_info.formulas import CostModel, Estimate
from baton.model_info.machines import MACHINES, MEASURED, Machine, find_machine, measure


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """`estimate.tokens_per_s` counts all sequences of the batch together."""

    batch_size: int
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Roofline:
    machine: Machine
    prefill: Estimate
    decode: tuple[DecodeRow, ...]


@dataclass(frozen=True, slots=True)
class Report:
    shape: ModelShape
    dtype: str
    block_size: int
    context_tokens: int
    weight_bytes: int
    """All parameters in `dtype`; those of a quantised folder as stored."""
    component_bytes: Mapping[Component, int]
    """What they are the sum of."""
    kv_bytes_per_token: int
    kv_bytes_per_block: int
    prefill_flops_per_token: float
    """Mean over a prompt of `context_tokens`."""
    decode_flops_per_token: int
    """At a context of `context_tokens`."""
    rooflines: tuple[Roofline, ...]
    notes: tuple[str, ...]


def build_report(
    folder: Path,
    *,
    machine: str | None = None,
    dtype: str | None = None,
    block_size: int = 16,
    context_tokens: int = 1024,
    batch_sizes: Sequence[int] = (1, 8, 32),
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """`machine` is a name of the table, "measure", or None for the whole table.

    Raises ConfigError for a folder that is no dense decoder model and for numbers below 1.
    """
    sizes = {"block_size": block_size, "context": context_tokens, "batch": min(batch_sizes)}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} must be at least 1, got {size}")
    shape = read_shape(folder)
    kind = dtype or shape.dtype
    model = cost_model(shape, kind)
    component_bytes = weight_bytes(shape, model.dtype_bytes)
    kv_bytes = formulas.kv_bytes_per_token(model)
    return Report(
        shape=shape,
        dtype=kind,
        block_size=block_size,
        context_tokens=context_tokens,
        weight_bytes=sum(component_bytes.values()),
        component_bytes=component_bytes,
        kv_bytes_per_token=kv_bytes,
        kv_bytes_per_block=kv_bytes * block_size,
        prefill_flops_per_token=formulas.prefill_flops(model, context_tokens) / context_tokens,
        decode_flops_per_token=formulas.decode_flops(model, context_tokens),
        rooflines=tuple(
            _roofline(model, chosen, kind, context_tokens, batch_sizes)
            for chosen in _machines(machine, kind, on_step)
        ),
        notes=_notes(shape, context_tokens),
    )


def weight_bytes(shape: ModelShape, dtype_bytes: int) -> Mapping[Component, int]:
    if weight_scheme(shape.quantization) is not None:
        return shape.component_bytes
    return {component: params * dtype_bytes for component, params in shape.params.items()}


def cost_model(shape: ModelShape, dtype: str) -> CostModel:
    read = weight_bytes(shape, DTYPE_BYTES[dtype])
    head = Component.EMBEDDING if shape.is_tied else Component.HEAD
    read_components = (Component.ATTENTION, Component.MLP, Component.NORMS, head)
    return CostModel(
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        layer_matmul_params=shape.params[Component.ATTENTION] + shape.params[Component.MLP],
        head_params=shape.vocab_size * shape.hidden_size,
        weight_bytes_per_step=sum(read[component] for component in read_components),
        dtype_bytes=DTYPE_BYTES[dtype],
    )


def _machines(name: str | None, dtype: str, on_step: Callable[[str], None]) -> tuple[Machine, ...]:
    if name is None:
        return tuple(machine for machine in MACHINES if dtype in machine.flops_per_s)
    return (measure(dtype, on_step=on_step) if name == MEASURED else find_machine(name),)


def _roofline(
    model: CostModel,
    machine: Machine,
    dtype: str,
    context_tokens: int,
    batch_sizes: Sequence[int],
) -> Roofline:
    flops_per_s, bytes_per_s = machine.flops_for(dtype), machine.bytes_per_s
    return Roofline(
        machine=machine,
        prefill=formulas.prefill_estimate(
            model, context_tokens, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s
        ),
        decode=tuple(
            DecodeRow(
                batch_size,
                formulas.decode_estimate(
                    model,
                    batch_size,
                    context_tokens,
                    flops_per_s=flops_per_s,
                    bytes_per_s=bytes_per_s,
                ),
            )
            for batch_size in batch_sizes
        ),
    )


def _notes(shape: ModelShape, context_tokens: int) -> tuple[str, ...]:
    notes = []
    if shape.sliding_window is not None and shape.sliding_window < context_tokens:
        notes.append(
            f"attention is counted over the whole context; layers with a window of "
            f"{shape.sliding_window} tokens cost less"
        )
    limit = shape.max_position_embeddings
    if limit is not None and context_tokens > limit:
        notes.append(f"a context of {context_tokens} is beyond the model's limit of {limit}")
    if shape.quantization is not None and shape.quantization.has_kv_scales:
        notes.append(
            "the folder holds scales for an FP8 KV cache, which takes one byte per element instead "
            "of what is shown"
        )
    if shape.params[Component.OTHER]:
        notes.append(
            f"{shape.params[Component.OTHER]:,} parameters belong to no known component and are "
            "left out of FLOPs"
        )
    return tuple(notes)
