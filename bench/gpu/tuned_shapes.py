"""Shapes whose tiles are worth choosing by measurement, in the order of what they weigh.

A shape is a value that can be sent to another process; its inputs are made where it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from bench.gpu.attention_inputs import FP8, Heads, decode_inputs, prefill_inputs
from bench.gpu.cases import Bound, Scale
from bench.gpu.gemm_inputs import AS_ENGINE, Weights, gemm_inputs
from bench.gpu.shapes import LLAMA_2_7B, LLAMA_3_1_8B, LLAMA_3_2_1B, ModelShape
from bench.gpu.timing import Call
from kernels import (
    decode_attention,
    fp8_gemm,
    prefill_attention_tile,
    skinny_gemm,
    weight_only_gemm,
)
from kernels.gemm_launch import GemmWorkspace

BF16 = torch.bfloat16
OPS = ("bf16", "int8", "int4", "fp8-weight", "w8a8", "decode-attention", "prefill-attention")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Inputs in memory."""

    calls: Callable[[Any], list[Call]]
    """One call per input set, for a tile."""
    error: Callable[[Any], float]


class TunedShape(Protocol):
    @property
    def op(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def bound(self) -> Bound: ...

    @property
    def num_bytes(self) -> float: ...

    @property
    def flops(self) -> float: ...

    def at(self, scale: Scale) -> TunedShape:
        """Tiny where the scale is."""
        ...

    def tiles(self) -> list[Any]:
        """The kernel's own candidates, the table's first."""
        ...

    def compile_key(self, tile: Any) -> Hashable:
        """Equal where two shapes run the same compiled kernel."""
        ...

    def prepare(self, scale: Scale, tiles: Sequence[Any]) -> Prepared: ...


@dataclass(frozen=True, slots=True)
class GemmShape:
    """A layer with what the engine fuses into it."""

    kind: Weights
    model: str
    layer: str
    num_rows: int
    n: int
    k: int

    @property
    def op(self) -> str:
        return {
            Weights.INT4_128: "int4",
            Weights.INT4_64: "int4",
            Weights.FP8: "fp8-weight",
        }.get(self.kind, self.kind.value)

    @property
    def name(self) -> str:
        return (
            f"{self.kind.value} {self.model} {self.layer} {self.n} x {self.k}, {self.num_rows} rows"
        )

    @property
    def bound(self) -> Bound:
        if self.num_rows <= 64:
            return Bound.READ
        return Bound.FP8_MATMUL if self.kind is Weights.W8A8 else Bound.MATMUL

    @property
    def num_bytes(self) -> float:
        return self.kind.num_bytes(self.n, self.k) + 2.0 * self.num_rows * (self.n + self.k)

    @property
    def flops(self) -> float:
        return 2.0 * self.num_rows * self.n * self.k

    def at(self, scale: Scale) -> GemmShape:
        return replace(
            self,
            num_rows=scale.upto(self.num_rows, 70),
            n=scale.upto(self.n, 192),
            k=scale.upto(self.k, 1024),
        )

    def tiles(self) -> list[Any]:
        size = self.num_rows, self.n, self.k
        if self.kind is Weights.BF16:
            return list(skinny_gemm.candidate_tiles(*size, itemsize=2))
        if self.kind is Weights.W8A8:
            return list(fp8_gemm.candidate_tiles(*size))
        return list(weight_only_gemm.candidate_tiles(*size, group_size=self.kind.group_size))

    def compile_key(self, tile: Any) -> Hashable:
        # Triton compiles anew for a row count of one, and for multiples of 16.
        rows = (self.num_rows == 1, self.num_rows % 16 == 0, self.num_rows <= 64)
        return self.kind, AS_ENGINE[self.layer], rows, self.k % tile.block_k == 0, tile

    def prepare(self, scale: Scale, tiles: Sequence[Any]) -> Prepared:
        launches = [(self.num_rows, self.n, tile) for tile in tiles]
        shared = GemmWorkspace.for_launches(launches, scale.device)
        num_sets = scale.num_input_sets(int(self.kind.num_bytes(self.n, self.k)))
        size = self.num_rows, self.n, self.k
        around = AS_ENGINE[self.layer]
        inputs = [gemm_inputs(scale, self.kind, shared, *size, around) for _ in range(num_sets)]
        return Prepared(lambda tile: [partial(one.run, tile) for one in inputs], inputs[0].error)


@dataclass(frozen=True, slots=True)
class DecodeShape:
    heads: Heads
    batch: int
    length: int
    block_size: int
    is_fp8: bool = False

    @property
    def op(self) -> str:
        return "decode-attention"

    @property
    def name(self) -> str:
        kind = "fp8 KV" if self.is_fp8 else "bf16"
        return f"decode {self.batch} x {self.length} {self.heads} block {self.block_size} {kind}"

    @property
    def bound(self) -> Bound:
        return Bound.COPY

    @property
    def num_bytes(self) -> float:
        heads, item = self.heads, self._dtype.itemsize
        return 2.0 * self.batch * self.length * heads.num_kv_heads * heads.head_dim * item

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.length * self.heads.num_heads * self.heads.head_dim

    @property
    def _dtype(self) -> torch.dtype:
        return FP8 if self.is_fp8 else BF16

    def at(self, scale: Scale) -> DecodeShape:
        batch, length = scale.upto(self.batch, 2), scale.upto(self.length, 90)
        return replace(self, heads=self.heads.at(scale), batch=batch, length=length)

    def tiles(self) -> list[Any]:
        heads = self.heads
        group = heads.num_heads // heads.num_kv_heads
        return list(
            decode_attention.candidate_tiles(
                heads.head_dim, self._dtype.itemsize, group, self.batch * heads.num_kv_heads
            )
        )

    def compile_key(self, tile: Any) -> Hashable:
        # The number of sequences is rounded up to a power of two in the kernel.
        size = (self.batch - 1).bit_length(), self.batch == 1, self.batch % 16 == 0
        # Tables of a multiple of 16 blocks are loaded differently.
        table = -(-self.length // self.block_size) % 16 == 0
        return self.heads, self.block_size, self.is_fp8, size, table, tile

    def prepare(self, scale: Scale, tiles: Sequence[Any]) -> Prepared:
        size = self.heads, self.batch, self.length, self.block_size, self._dtype
        num_sets = scale.num_input_sets(int(self.num_bytes))
        inputs = [decode_inputs(scale, *size) for _ in range(num_sets)]
        return Prepared(
            lambda tile: [partial(one.for_tile(tile).run, tile) for one in inputs],
            lambda tile: inputs[0].for_tile(tile).error(tile),
        )


@dataclass(frozen=True, slots=True)
class PrefillShape:
    heads: Heads
    batch: int
    prefix: int
    num_new: int
    block_size: int
    is_fp8: bool = False

    @property
    def op(self) -> str:
        return "prefill-attention"

    @property
    def name(self) -> str:
        kind = "fp8 KV" if self.is_fp8 else "bf16"
        what = f"{self.batch} x {self.num_new}" + (f" behind {self.prefix}" if self.prefix else "")
        return f"prefill {what} {self.heads} block {self.block_size} {kind}"

    @property
    def bound(self) -> Bound:
        return Bound.MATMUL

    @property
    def num_bytes(self) -> float:
        heads, item = self.heads, self._dtype.itemsize
        length = self.prefix + self.num_new
        kv_bytes = 2.0 * self.batch * length * heads.num_kv_heads * heads.head_dim * item
        return kv_bytes + 4.0 * self.batch * self.num_new * heads.num_heads * heads.head_dim

    @property
    def flops(self) -> float:
        pairs = self.num_new * self.prefix + self.num_new * (self.num_new + 1) / 2
        return 4.0 * self.batch * pairs * self.heads.num_heads * self.heads.head_dim

    @property
    def _dtype(self) -> torch.dtype:
        return FP8 if self.is_fp8 else BF16

    def at(self, scale: Scale) -> PrefillShape:
        return replace(
            self,
            heads=self.heads.at(scale),
            batch=scale.upto(self.batch, 2),
            prefix=scale.upto(self.prefix, 70),
            num_new=scale.upto(self.num_new, 140),
        )

    def tiles(self) -> list[Any]:
        heads = self.heads
        group = heads.num_heads // heads.num_kv_heads
        return list(
            prefill_attention_tile.candidate_tiles(
                heads.head_dim, self._dtype.itemsize, self.num_new, group
            )
        )

    def compile_key(self, tile: Any) -> Hashable:
        lone = self.batch == 1
        # Grid sizes that are one or a multiple of 16 are compiled for.
        num_tiles = -(-self.num_new // (tile.block_m // tile.pack))
        return self.heads, self.block_size, self.is_fp8, lone, num_tiles == 1, num_tiles % 16, tile

    def prepare(self, scale: Scale, tiles: Sequence[Any]) -> Prepared:
        inputs = prefill_inputs(
            scale, self.heads, self.batch, self.prefix, self.num_new, self.block_size, self._dtype
        )
        return Prepared(lambda tile: [partial(inputs.run, tile)], inputs.error)


def tuned_shapes() -> Iterator[TunedShape]:
    """The most important first."""
    yield from _first_attention()
    eight = LLAMA_3_1_8B
    for kind in (Weights.BF16, Weights.INT8, Weights.INT4_128):
        yield from _gemms(eight, kind, (1,))
    yield from _gemms(eight, Weights.BF16, (8, 64, 32))
    for kind in (Weights.W8A8, Weights.FP8):
        yield from _gemms(eight, kind, (1,))
    yield from _prefill_gemms(eight)
    yield from _more_attention()
    for kind in (Weights.INT8, Weights.INT4_128, Weights.W8A8, Weights.FP8):
        yield from _gemms(eight, kind, (8, 64, 32))
    yield from _gemms(eight, Weights.BF16, (2, 4, 16))
    for model in (LLAMA_3_2_1B, LLAMA_2_7B):
        yield from _gemms(model, Weights.BF16, (1, 8, 64, 32, 2, 4, 16))
    for kind in (Weights.INT8, Weights.INT4_128, Weights.W8A8, Weights.FP8):
        yield from _gemms(eight, kind, (2, 4, 16))
    for model in (LLAMA_3_2_1B, LLAMA_2_7B):
        for kind in (Weights.INT8, Weights.INT4_128):
            yield from _gemms(model, kind, (1, 8, 64))


def _gemms(model: ModelShape, kind: Weights, row_counts: Sequence[int]) -> Iterator[TunedShape]:
    for num_rows in row_counts:
        for layer in ("gate_up", "down", "qkv", "o", "head"):
            yield GemmShape(kind, model.name, layer, num_rows, *model.linears[layer])


def _prefill_gemms(model: ModelShape) -> Iterator[TunedShape]:
    for kind in (Weights.W8A8, Weights.INT4_128, Weights.INT8, Weights.FP8):
        for num_rows in (1024, 8192):
            for layer in ("gate_up", "down"):
                yield GemmShape(kind, model.name, layer, num_rows, *model.linears[layer])


def _first_attention() -> Iterator[TunedShape]:
    heads = Heads()
    yield PrefillShape(heads, 1, 0, 8192, 64)
    yield DecodeShape(heads, 128, 4096, 64)
    yield PrefillShape(heads, 1, 0, 8192, 16)
    yield DecodeShape(heads, 128, 4096, 64, is_fp8=True)
    yield DecodeShape(heads, 8, 1024, 64)
    yield DecodeShape(heads, 1, 4096, 64)


def _more_attention() -> Iterator[TunedShape]:
    heads, half, many = Heads(), Heads(32, 8, 64), Heads(32, 32, 128)
    yield PrefillShape(heads, 1, 0, 1024, 64)
    yield PrefillShape(heads, 1, 4096, 1024, 64)
    yield PrefillShape(heads, 1, 0, 8192, 64, is_fp8=True)
    yield DecodeShape(heads, 32, 1024, 64)
    yield DecodeShape(heads, 64, 4096, 16)
    yield DecodeShape(heads, 1, 4096, 64, is_fp8=True)
    yield DecodeShape(half, 128, 4096, 64)
    yield DecodeShape(half, 1, 4096, 64)
    yield PrefillShape(half, 1, 0, 8192, 64)
    yield PrefillShape(heads, 1, 0, 8192, 16, is_fp8=True)
    yield DecodeShape(many, 32, 4096, 64)
    yield PrefillShape(many, 1, 0, 4096, 64)
    yield PrefillShape(heads, 1, 0, 32768, 64)
    yield PrefillShape(heads, 1, 0, 32768, 16)
