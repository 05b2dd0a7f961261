"""The paged KV pool of one rank as a device tensor, and the scales of its FP8 form.

    pool[num_blocks, num_kv_heads of this rank, num_layers, 2, block_size, head_dim]

Taken by one plain allocation, so that its address can be registered for transfers. Not known
here: who owns which block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.core.kv_layout import KvLayout


class GpuKvPool:
    """Memory of all blocks of one rank."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        device: torch.device,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """`layout`: the rank's own, with its KV heads alone. `k_scale`, `v_scale` float32
        [num_layers, num_kv_heads] for an FP8 one."""
        self.layout = layout
        self.num_blocks = num_blocks
        # Zeroed, so that no number that was never computed enters a masked tail.
        self.blocks: Tensor = torch.zeros(
            layout.pool_shape(num_blocks), dtype=getattr(torch, layout.dtype), device=device
        )
        self.k_scale = k_scale
        self.v_scale = v_scale

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """K and V scales [num_kv_heads] of a layer, None where KV is not quantised."""
        if self.k_scale is None or self.v_scale is None:
            return None, None
        return self.k_scale[layer], self.v_scale[layer]

    @property
    def address(self) -> int:
        """Device address of the first byte."""
        return self.blocks.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self.blocks.numel() * self.blocks.element_size()
