"""The paged KV pool as tensors, and the arithmetic from block ids to rows of it.

    pool[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]

Two flat views serve everything: `token_rows` [.., head_dim], written one token at a time, and
`block_rows` [.., block_size * head_dim], gathered one block at a time. The row of
(block, head, layer 0, K) is computed once a step; another layer or V is a constant further.

Not known here: who owns which block, and which blocks hold live tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.host_memory import map_pool

IntArray = npt.NDArray[np.int64]


class KvPool:
    """The memory of all blocks of one worker."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        memory: memoryview | None = None,
        device: torch.device,
    ) -> None:
        """`memory` (zeroed, writable, kept alive by us) holds the pool; None allocates it.

        Raises ConfigError when the memory does not hold `num_blocks` blocks.
        """
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
        flat = torch.frombuffer(memory, dtype=dtype, count=num_bytes // dtype.itemsize)
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_bytes = num_bytes
        self.blocks: Tensor = flat.view(layout.pool_shape(num_blocks))
        self.token_rows: Tensor = flat.view(-1, layout.head_dim)
        self.block_rows: Tensor = flat.view(-1, layout.block_size * layout.head_dim)
        self._memory = memory
        self._head_starts = np.arange(layout.num_kv_heads, dtype=np.int64) * layout.num_layers * 2
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

    def write(self, rows: Tensor, keys_values: Tensor) -> None:
        """Store keys_values [num_tokens, 2 * num_kv_heads, head_dim] at one layer's `slot_rows`."""
        self.token_rows.index_put_((rows,), keys_values)

    def gather(self, rows: Tensor, num_seqs: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer's `gather_rows`, each contiguous.

        Returns two of [num_seqs * num_kv_heads, num_blocks * block_size, head_dim].
        """
        flat = self.block_rows.index_select(0, rows)
        layout = self.layout
        both = flat.view(2, num_seqs * layout.num_kv_heads, -1, layout.head_dim)
        return both[0], both[1]
