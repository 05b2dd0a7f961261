"""Attention over the paged KV pool: many sequences with one query each, or one with many.

K and V of a layer are gathered block by block into contiguous buffers small enough to stay in
the processor's cache, and all query heads that share a KV head are rows of one matrix product.
Queries arrive already scaled: 1 / sqrt(head_dim) is folded into the projection's weights.

Not known here: where KV comes from, which layer this is, and what is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.kv_cache import KvPool

MAX_TILE_QUERIES = 128
"""Queries of one chunk that are scored together. Smaller tiles score fewer masked pairs, larger
ones call fewer operators; 128 is the best of 64, 128, 256 for a chunk of 512."""
MIN_TILE_QUERIES = 32
MAX_TILE_SCORES = 4 << 20
"""Scores of one tile over all heads; longer contexts take fewer queries a tile."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of similar length with one query each, padded to the longest."""

    first_row: int
    num_seqs: int
    gather_rows: list[Tensor]
    """Per layer, see KvPool.gather_rows."""
    num_context: int
    """Keys of the longest sequence."""
    mask: Tensor | None
    """[num_seqs, 1, padded length], 0 or -inf; None when no position is padding."""


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive queries of one sequence, the last of which ends its context."""

    first_row: int
    num_rows: int
    num_context: int
    """Keys that the last query sees: cached prefix and the chunk itself."""
    gather_rows: list[Tensor]


class PagedAttention:
    """Scores, softmax and weighted sum for one layer at a time."""

    __slots__ = ("_causal_mask", "_group_size", "_head_dim", "_num_kv_heads", "_pool")

    def __init__(
        self, pool: KvPool, *, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """`group_size` query heads share one KV head."""
        self._pool = pool
        self._group_size = group_size
        self._num_kv_heads = pool.num_kv_heads
        self._head_dim = pool.layout.head_dim
        side = (MAX_TILE_QUERIES, MAX_TILE_QUERIES)
        mask = torch.full(side, float("-inf"), dtype=dtype, device=device).triu_(1)
        self._causal_mask = mask.repeat_interleave(group_size, dim=0)

    def decode(self, group: DecodeGroup, layer: int, queries: Tensor) -> Tensor:
        """queries [num_seqs, num_heads * head_dim] -> the same shape."""
        size, num_seqs = self._group_size, group.num_seqs
        keys, values = self._pool.gather(group.gather_rows[layer], num_seqs, layer)
        heads = queries.reshape(num_seqs * self._num_kv_heads, size, self._head_dim)
        if num_seqs == 1:
            # One fused call beats three; from two sequences on it is the slower way.
            used = (slice(None), slice(group.num_context))
            return F.scaled_dot_product_attention(
                heads[None], keys[used][None], values[used][None], scale=1.0
            ).view(1, -1)
        scores = torch.bmm(heads, keys.transpose(1, 2))
        if group.mask is not None:
            scores.view(num_seqs, self._num_kv_heads * size, -1).add_(group.mask)
        return torch.bmm(torch.softmax(scores, -1), values).view(num_seqs, -1)

    def prefill(self, chunk: PrefillChunk, layer: int, queries: Tensor, out: Tensor) -> None:
        """queries [num_rows, num_heads * head_dim], result into `out` of the same shape."""
        keys, values = self._pool.gather(chunk.gather_rows[layer], 1, layer)
        keys = keys.transpose(1, 2)
        shape = (-1, self._num_kv_heads, self._group_size, self._head_dim)
        queries, out = queries.unflatten(-1, shape[1:]), out.view(shape)
        num_cached = chunk.num_context - chunk.num_rows
        step = self._tile_queries(chunk.num_context)
        for first in range(0, chunk.num_rows, step):
            last = min(first + step, chunk.num_rows)
            begin, end = num_cached + first, num_cached + last
            num_tile_rows = (last - first) * self._group_size
            tile = queries[first:last].transpose(0, 1)
            tile = tile.reshape(self._num_kv_heads, num_tile_rows, self._head_dim)
            scores = torch.bmm(tile, keys[:, :, :end])
            scores[:, :, begin:end].add_(self._causal_mask[:num_tile_rows, : last - first])
            result = torch.bmm(torch.softmax(scores, -1), values[:, :end])
            out[first:last].copy_(result.view(self._num_kv_heads, -1, *shape[2:]).transpose(0, 1))

    def _tile_queries(self, num_context: int) -> int:
        """Queries a tile: as many as keep its scores within the bound."""
        heads = self._num_kv_heads * self._group_size
        fitting = MAX_TILE_SCORES // (heads * num_context)
        return max(MIN_TILE_QUERIES, min(MAX_TILE_QUERIES, fitting))
