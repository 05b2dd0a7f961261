"""Quantised matrices as checkpoint tensors, in the names and layouts of compressed-tensors.

    FP8, FP8_WEIGHT   NAME.weight         float8_e4m3fn [out, in]
    INT8              NAME.weight_packed  int32 [out, in / 4], INT4 [out, in / 8]: the numbers plus
                                          2^(bits - 1), lowest bits first
    all               NAME.weight_scale   [out, 1] or [out, in / group_size]
    INT8, INT4        NAME.weight_shape   int64 (out, in)

An int32 of packed numbers is, byte for byte, four or eight consecutive numbers in memory order, so
packing is a view. Source: https://github.com/vllm-project/compressed-tensors
(compressors/pack_quantized)
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.quantization import WORD_BITS, QuantizationConfig, Scheme
from baton.engine.checkpoint import FLOAT_TYPES, Part, TensorSource
from baton.engine.quantization.weight import QuantizedWeight

SIGN_BIT = 0x80
"""Turns an int8 into the same number plus 128, and back."""


def stored_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a folder that hold `weight` as the projection `name`."""
    scale = weight.scale.view(weight.shape[0], -1)
    if weight.scheme.is_float:
        return {f"{name}.weight": weight.data, f"{name}.weight_scale": scale}
    data = weight.data
    if weight.scheme is Scheme.INT8:
        data = data.view(torch.uint8) ^ SIGN_BIT
    return {
        f"{name}.weight_packed": data.view(torch.int32),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def take_quantized(
    source: TensorSource,
    name: str,
    shape: tuple[int, int],
    config: QuantizationConfig,
    *,
    part: Part | None = None,
    device: torch.device,
) -> QuantizedWeight:
    """`part` (rows, columns) of the projection `name`, whose whole is of `shape`, on the device.

    Raises ConfigError when a tensor is missing or misshapen, or when groups would be cut.
    """
    scheme = config.scheme
    if scheme is None:
        raise ConfigError(f"{name} is asked for quantised, but the folder has no scheme")
    rows, columns = part or (slice(None), slice(None))
    config.check_width(shape[1], f"the input width of {name}")
    start, stop, _ = columns.indices(shape[1])
    config.check_width(start, f"the first input of the part of {name}")
    config.check_width(stop, f"the last input of the part of {name}")
    data = _take_numbers(source, name, shape, scheme, rows, slice(start, stop))
    group_size = config.group_size or shape[1]
    groups = slice(start // group_size, -(-stop // group_size))
    scale = source.take(
        f"{name}.weight_scale",
        (shape[0], shape[1] // group_size),
        part=(rows, groups),
        dtypes=FLOAT_TYPES,
    ).to(device, torch.float32)
    return QuantizedWeight(
        scheme,
        data.to(device),
        scale if config.group_size is not None else scale.view(-1),
        config.group_size,
    )


def _take_numbers(
    source: TensorSource,
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    rows: slice,
    columns: slice,
) -> Tensor:
    """The numbers as QuantizedWeight keeps them, contiguous."""
    if scheme.is_float:
        dtypes = (torch.float8_e4m3fn,)
        part = (rows, columns)
        return source.take(f"{name}.weight", shape, part=part, dtypes=dtypes).contiguous()
    per_word = WORD_BITS // scheme.num_bits
    packed = source.take(
        f"{name}.weight_packed",
        (shape[0], shape[1] // per_word),
        part=(rows, slice(columns.start // per_word, columns.stop // per_word)),
        dtypes=(torch.int32,),
    )
    if source.has(f"{name}.weight_shape"):
        told = source.take(f"{name}.weight_shape", (2,), dtypes=(torch.int64,)).tolist()
        if tuple(told) != shape:
            raise ConfigError(f"{name}.weight_shape says {told}, config.json implies {shape}")
    data = packed.contiguous().view(torch.uint8)
    return data if scheme is Scheme.INT4 else (data ^ SIGN_BIT).view(torch.int8)
