"""Launches of the GEMM kernels at real models' shapes, to be compiled for Hopper anywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.dequantize_weight import dequantize_weight
from kernels.fp8_gemm import fp8_gemm, quantize_fp8_rows
from kernels.int4_packing import packed_width
from kernels.skinny_gemm import skinny_gemm
from kernels.weight_only_gemm import weight_only_gemm

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn

# (rows of the weight, K, what follows the product)
LINEARS = {
    "llama-3.1-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "llama-3.2-1b": {
        "qkv": (3072, 2048),
        "o": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
        "head": (128256, 2048),
    },
    "llama-2-7b": {
        "qkv": (12288, 4096),
        "o": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
        "head": (32000, 4096),
    },
}
DECODE_NUM_ROWS = (1, 8, 32, 64)
PREFILL_NUM_ROWS = 1024


def _epilogue(layer: str, num_rows: int, n: int) -> dict[str, Tensor | bool | None]:
    """What the engine asks of this layer besides the product; the norm is the caller's."""
    residual = torch.empty(num_rows, n, dtype=BF16) if layer in ("o", "down") else None
    return {"residual": residual, "out": residual, "swiglu": layer == "gate_up"}


def _rms_eps(layer: str) -> float | None:
    return None if layer in ("o", "down") else 1e-5


def _skinny(layer: str, num_rows: int, n: int, k: int) -> None:
    x, weight = torch.empty(num_rows, k, dtype=BF16), torch.empty(n, k, dtype=BF16)
    skinny_gemm(
        x, weight, rms_eps=_rms_eps(layer), launch_pdl=True, **_epilogue(layer, num_rows, n)
    )  # type: ignore[arg-type]


def _eight_bit(layer: str, num_rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = torch.empty(num_rows, k, dtype=BF16), torch.empty(n, k, dtype=dtype)
    weight_only_gemm(
        x,
        weight,
        torch.empty(n),
        rms_eps=_rms_eps(layer),
        launch_pdl=True,
        **_epilogue(layer, num_rows, n),
    )  # type: ignore[arg-type]


def _int4(layer: str, num_rows: int, n: int, k: int, group_size: int = 128) -> None:
    x = torch.empty(num_rows, k, dtype=BF16)
    weight = torch.empty(n, packed_width(k, group_size), dtype=torch.int16)
    scale = torch.empty(-(-k // group_size), n, dtype=BF16).t()
    weight_only_gemm(
        x,
        weight,
        scale,
        group_size=group_size,
        rms_eps=_rms_eps(layer),
        launch_pdl=True,
        **_epilogue(layer, num_rows, n),
    )  # type: ignore[arg-type]


def _fp8(layer: str, num_rows: int, n: int, k: int) -> None:
    x_fp8, scale = quantize_fp8_rows(
        torch.empty(num_rows, k, dtype=BF16), rms_eps=_rms_eps(layer), launch_pdl=True
    )
    weight = torch.empty(n, k, dtype=FP8)
    fp8_gemm(x_fp8, scale, weight, torch.empty(n), launch_pdl=True, **_epilogue(layer, num_rows, n))  # type: ignore[arg-type]


def _dequantize(kind: torch.dtype | int, n: int, k: int) -> None:
    out = torch.empty(n, k, dtype=BF16)
    if isinstance(kind, int):
        words = torch.empty(n, packed_width(k, kind), dtype=torch.int16)
        scale = torch.empty(k // kind, n, dtype=torch.float16).t()
        dequantize_weight(words, scale, group_size=kind, out=out)
    else:
        dequantize_weight(torch.empty(n, k, dtype=kind), torch.empty(n), out=out)


def _cases() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[[], None]] = {}
    kinds: dict[str, Callable[[str, int, int, int], None]] = {
        "bf16": _skinny,
        "int8": lambda *shape: _eight_bit(*shape, torch.int8),
        "e4m3": lambda *shape: _eight_bit(*shape, FP8),
        "int4": _int4,
        "w8a8": _fp8,
    }
    for model, layers in LINEARS.items():
        for layer, (n, k) in layers.items():
            for kind, launch in kinds.items():
                for num_rows in (*DECODE_NUM_ROWS, PREFILL_NUM_ROWS):
                    if num_rows == PREFILL_NUM_ROWS and kind == "bf16":
                        continue
                    cases[f"{kind} {model} {layer} M={num_rows}"] = (
                        lambda launch=launch, layer=layer, num_rows=num_rows, n=n, k=k: launch(
                            layer, num_rows, n, k
                        )
                    )
    for group_size in (32, 64):
        for num_rows in (1, 64, PREFILL_NUM_ROWS):
            cases[f"int4 group {group_size} M={num_rows}"] = (
                lambda group_size=group_size, num_rows=num_rows: _int4(
                    "qkv", num_rows, 6144, 4096, group_size
                )
            )
    for kind in (torch.int8, FP8, 32, 64, 128):
        cases[f"dequantize {kind}"] = lambda kind=kind: _dequantize(kind, 28672, 4096)
    for num_rows in (2, 4):
        cases[f"int8 odd sizes M={num_rows}"] = lambda num_rows=num_rows: _eight_bit(
            "qkv", num_rows, 1000, 1040, torch.int8
        )
        cases[f"int4 odd sizes M={num_rows}"] = lambda num_rows=num_rows: _int4(
            "qkv", num_rows, 1000, 1040, 64
        )
    return cases


CASES = _cases()

ALLOWED_SPILL_BYTES = {
    # Four scales a block: addresses wait in local memory, so that two programs still fit.
    "int4 group 64 M=1": 96,
}
