"""The paged KV pool as tensors, and the arithmetic from block ids to rows of it.

    pool[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]

Two flat views serve everything: `token_rows` [.., head_dim], written one token at a time, and
`block_rows` [.., block_size * head_dim], gathered one block at a time. The row of
(block, head, layer 0, K) is computed once a step; another layer or V is a constant further.

A pool of e4m3 numbers (layout dtype float8_e4m3fn) is written and gathered through a scale per
layer and head: what is stored is key / scale, and what is gathered is the stored number * scale.

Not known here: who owns which block, and which blocks hold live tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.host_memory import map_pool
from baton.engine.parallel import SINGLE, Parallel
from baton.engine.quantization.rounding import to_fp8

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class KvScales:
    """What an FP8 pool of one rank needs besides memory."""

    k: Tensor
    """float32 [num_layers, num_kv_heads of the rank]: stored number * scale = key."""
    v: Tensor
    dtype: torch.dtype
    """Of keys and values outside the pool."""


class KvPool:
    """The memory of all blocks of one worker, and the rows of it that one rank computes.

    The ranks of a tensor-parallel group share the memory; each works on its own KV heads.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        memory: memoryview | None = None,
        device: torch.device,
        parallel: Parallel = SINGLE,
        scales: KvScales | None = None,
    ) -> None:
        """`memory` (zeroed, writable, kept alive by us) holds the pool; None allocates it.

        `scales` belong to a layout of e4m3 and to it alone. Raises ConfigError when the memory
        does not hold `num_blocks` blocks, or `parallel` does not divide the KV heads.
        """
        heads = parallel.share(layout.num_kv_heads, "num_key_value_heads")
        num_bytes = num_blocks * layout.block_bytes
        dtype: torch.dtype = getattr(torch, layout.dtype)
        if device.type != "cpu":
            raise ConfigError(f"KV pool on device {device.type!r} is not supported; use cpu")
        if memory is None:
            memory = map_pool(num_bytes)
        if memory.nbytes < num_bytes:
            raise ConfigError(
                f"the KV pool needs {num_bytes} bytes for {num_blocks} blocks, "
                f"the given memory has {memory.nbytes}"
            )
        # torch moves rows of bytes, but not of e4m3 numbers.
        moved = torch.uint8 if dtype is torch.float8_e4m3fn else dtype
        flat = torch.frombuffer(memory, dtype=moved, count=num_bytes // dtype.itemsize)
        self.layout = layout
        self.dtype = dtype if scales is None else scales.dtype
        """Of what `gather` gives."""
        self.num_blocks = num_blocks
        self.num_kv_heads: int = heads.stop - heads.start
        """Of this rank; `gather_rows` and the others below are about these heads alone."""
        self.num_bytes = num_bytes
        self.blocks: Tensor = flat.view(dtype).view(layout.pool_shape(num_blocks))
        self.token_rows: Tensor = flat.view(-1, layout.head_dim)
        self.block_rows: Tensor = flat.view(-1, layout.block_size * layout.head_dim)
        self._memory = memory
        self._fp8 = _Fp8Rows.of(layout, scales)
        head_ids = np.arange(heads.start, heads.stop, dtype=np.int64)
        self._head_starts = head_ids * layout.num_layers * 2
        self._block_stride = layout.num_kv_heads * layout.num_layers * 2
        self._layer_starts = torch.arange(layout.num_layers)[:, None] * 2
        self._token_layer_starts = self._layer_starts * layout.block_size

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self.blocks.data_ptr()

    def gather_rows(self, block_table: IntArray) -> list[Tensor]:
        """Rows of `block_rows` that hold K, then V, of the given blocks; one tensor per layer.

        block_table [num_seqs, num_blocks] -> int64 [2 * num_seqs * num_kv_heads * num_blocks]
        """
        keys = (block_table * self._block_stride)[:, None, :] + self._head_starts[None, :, None]
        first = torch.from_numpy(np.concatenate((keys.reshape(-1), keys.reshape(-1) + 1)))
        return list((first[None] + self._layer_starts).unbind())

    def slot_rows(self, block_ids: IntArray, offsets: IntArray) -> list[Tensor]:
        """Rows of `token_rows` for tokens at (block, offset); one tensor per layer.

        [num_tokens] each -> int64 [num_tokens, 2 * num_kv_heads]: K of all heads, then V.
        """
        heads = (block_ids * self._block_stride)[:, None] + self._head_starts[None, :]
        rows = np.concatenate((heads, heads + 1), axis=1)
        rows *= self.layout.block_size
        rows += offsets[:, None]
        first = torch.from_numpy(rows)
        return list((first[None] + self._token_layer_starts[:, :, None]).unbind())

    def write(self, rows: Tensor, keys_values: Tensor, layer: int) -> None:
        """Store keys_values [num_tokens, 2 * num_kv_heads, head_dim] at `layer`'s `slot_rows`."""
        if self._fp8 is not None:
            keys_values = self._fp8.stored(keys_values, layer)
        self.token_rows.index_put_((rows,), keys_values)

    def gather(self, rows: Tensor, num_seqs: int, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of `layer`'s `gather_rows`, each contiguous.

        Returns two of [num_seqs * num_kv_heads, num_blocks * block_size, head_dim].
        """
        flat = self.block_rows.index_select(0, rows)
        if self._fp8 is not None:
            flat = self._fp8.restored(flat, num_seqs, layer)
        both = flat.view(2, num_seqs * self.num_kv_heads, -1, self.layout.head_dim)
        return both[0], both[1]


class _Fp8Rows:
    """Between keys and values and the bytes of an FP8 pool."""

    __slots__ = ("_dtype", "_scales")

    def __init__(self, scales: KvScales) -> None:
        self._scales = torch.stack((scales.k, scales.v), dim=1)
        """[num_layers, 2, num_kv_heads]"""
        self._dtype = scales.dtype

    @classmethod
    def of(cls, layout: KvLayout, scales: KvScales | None) -> _Fp8Rows | None:
        is_fp8 = layout.dtype == "float8_e4m3fn"
        if is_fp8 != (scales is not None):
            raise ConfigError(
                f"a KV pool of {layout.dtype} {'needs' if is_fp8 else 'takes no'} scales"
            )
        return None if scales is None else cls(scales)

    def stored(self, keys_values: Tensor, layer: int) -> Tensor:
        """[num_tokens, 2 * num_kv_heads, head_dim] -> uint8 of the same shape."""
        return to_fp8(keys_values.float() / self._scales[layer].view(-1, 1)).view(torch.uint8)

    def restored(self, block_rows: Tensor, num_seqs: int, layer: int) -> Tensor:
        """uint8, K of all sequences and heads, then V -> keys and values in the same order."""
        numbers = block_rows.view(torch.float8_e4m3fn).float()
        scale = self._scales[layer].view(2, 1, -1, 1)
        return numbers.view(2, num_seqs, scale.shape[2], -1).mul_(scale).to(self._dtype)
