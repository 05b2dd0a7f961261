"""Queries and paged KV that attention is timed on, and what its result must be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.gpu.cases import Scale, relative_error, worst
from kernels.attention_reference import attend, gather_kv
from kernels.decode_attention import (
    DecodeTile,
    DecodeWorkspace,
    decode_attention,
    decode_attention_reference,
    decode_workspace,
)
from kernels.prefill_attention import prefill_attention
from kernels.prefill_attention_tile import PrefillTile

FP8 = torch.float8_e4m3fn
CHECKED_ROWS = 48
"""Queries of a prompt that are checked at its start, middle and end: the reference holds a score
for every query and key."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of Llama-3.1-8B unless told."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128

    def at(self, scale: Scale) -> Heads:
        """Two KV heads where sizes are tiny, with as many query heads each as before."""
        num_kv_heads = scale.upto(self.num_kv_heads, 2)
        group = self.num_heads // self.num_kv_heads
        return Heads(group * num_kv_heads, num_kv_heads, self.head_dim)

    def __str__(self) -> str:
        return f"h{self.num_heads}/{self.num_kv_heads} d{self.head_dim}"


@dataclass(frozen=True, slots=True)
class PagedKv:
    """Random K and V in a pool whose blocks are handed out in random order."""

    pool: Tensor
    """[num_blocks, num_kv_heads, 1, 2, block_size, head_dim]"""
    block_tables: Tensor
    seq_lens: Tensor
    scales: Tensor | None
    """[num_kv_heads] of an 8-bit pool, for K and V."""


def paged_kv(
    scale: Scale, heads: Heads, batch: int, length: int, block_size: int, dtype: torch.dtype
) -> PagedKv:
    """`batch` sequences of `length` tokens."""
    per_seq = -(-length // block_size)
    shape = (batch * per_seq, heads.num_kv_heads, 1, 2, block_size, heads.head_dim)
    order = torch.randperm(batch * per_seq, device=scale.device, dtype=torch.int32)
    return PagedKv(
        scale.randn(*shape, dtype=dtype),
        order.view(batch, per_seq),
        torch.full((batch,), length, device=scale.device, dtype=torch.int32),
        torch.full((heads.num_kv_heads,), 0.75, device=scale.device) if dtype == FP8 else None,
    )


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """One new token of every sequence."""

    query: Tensor
    kv: PagedKv
    scale: float
    out: Tensor
    workspace: DecodeWorkspace

    def run(self, tile: DecodeTile | None = None) -> Tensor:
        """`tile` is one that the workspace was made for."""
        return decode_attention(
            self.query,
            self.kv.pool,
            self.kv.block_tables,
            self.kv.seq_lens,
            layer=0,
            scale=self.scale,
            k_scale=self.kv.scales,
            v_scale=self.kv.scales,
            out=self.out,
            workspace=self.workspace,
            tile=tile,
        )

    def for_tile(self, tile: DecodeTile) -> DecodeInputs:
        """The same with a workspace that `tile` can use."""
        num_seqs, num_heads, head_dim = self.query.shape
        workspace = decode_workspace((num_seqs, num_heads, head_dim), self.kv.pool, tile=tile)
        return replace(self, workspace=workspace)

    def reference(self) -> Tensor:
        return decode_attention_reference(
            self.query.float(),
            self.kv.pool,
            self.kv.block_tables,
            self.kv.seq_lens,
            layer=0,
            scale=self.scale,
            k_scale=self.kv.scales,
            v_scale=self.kv.scales,
        )

    def error(self, tile: DecodeTile | None = None) -> float:
        self.out.fill_(float("nan"))
        return relative_error(self.run(tile), self.reference())


def decode_inputs(
    scale: Scale, heads: Heads, batch: int, length: int, block_size: int, dtype: torch.dtype
) -> DecodeInputs:
    kv = paged_kv(scale, heads, batch, length, block_size, dtype)
    query = scale.randn(batch, heads.num_heads, heads.head_dim)
    workspace = decode_workspace((batch, heads.num_heads, heads.head_dim), kv.pool)
    return DecodeInputs(query, kv, heads.head_dim**-0.5, torch.empty_like(query), workspace)


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    """`num_new` tokens of every sequence, the last of its context."""

    query: Tensor
    kv: PagedKv
    cu_query_lens: Tensor
    num_new: int
    scale: float
    out: Tensor

    def run(self, tile: PrefillTile | None = None) -> Tensor:
        return prefill_attention(
            self.query,
            self.kv.pool,
            self.kv.block_tables,
            self.cu_query_lens,
            self.kv.seq_lens,
            layer=0,
            max_query_len=self.num_new,
            scale=self.scale,
            k_scale=self.kv.scales,
            v_scale=self.kv.scales,
            out=self.out,
            tile=tile,
        )

    def error(self, tile: PrefillTile | None = None) -> float:
        """Of some queries of the first and of the last sequence."""
        self.out.fill_(float("nan"))
        out = self.run(tile)
        sequences = {0, len(self.kv.seq_lens) - 1}
        # A row that was never written is NaN, wherever it is.
        written = torch.isfinite(out).all()
        errors = [error for seq in sequences for error in self._errors(out, seq)]
        return worst(errors) if written else float("nan")

    def _errors(self, out: Tensor, seq: int) -> list[float]:
        kv, length = self.kv, int(self.kv.seq_lens[seq])
        keys, values = gather_kv(kv.pool, kv.block_tables[seq], length, 0, kv.scales, kv.scales)
        errors = []
        for start in {0, self.num_new // 2, max(self.num_new - CHECKED_ROWS, 0)}:
            end = min(start + CHECKED_ROWS, self.num_new)
            rows = slice(seq * self.num_new + start, seq * self.num_new + end)
            num_seen = length - self.num_new + end
            expected, _ = attend(
                self.query[rows],
                keys[:num_seen],
                values[:num_seen],
                scale=self.scale,
                sliding_window=0,
                soft_cap=0.0,
                sinks=None,
            )
            errors.append(relative_error(out[rows], expected))
        return errors


def prefill_inputs(
    scale: Scale,
    heads: Heads,
    batch: int,
    prefix: int,
    num_new: int,
    block_size: int,
    dtype: torch.dtype,
) -> PrefillInputs:
    kv = paged_kv(scale, heads, batch, prefix + num_new, block_size, dtype)
    query = scale.randn(batch * num_new, heads.num_heads, heads.head_dim)
    cu_query_lens = torch.arange(batch + 1, device=scale.device, dtype=torch.int32) * num_new
    return PrefillInputs(
        query, kv, cu_query_lens, num_new, heads.head_dim**-0.5, torch.empty_like(query)
    )
