"""Block ids to rows of the pool, and memory given from outside."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout
from baton.engine.kv_cache import KvPool

CPU = torch.device("cpu")


def make_layout(num_kv_heads: int, block_size: int = 4) -> KvLayout:
    return KvLayout(
        model_id="m",
        num_layers=3,
        num_kv_heads=num_kv_heads,
        head_dim=6,
        block_size=block_size,
        dtype="float32",
    )


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
@pytest.mark.parametrize("block_size", [1, 4])
def test_written_tokens_are_gathered_in_order(num_kv_heads: int, block_size: int) -> None:
    """Every (sequence, layer, head, position) gets its own number and keeps it."""
    layout = make_layout(num_kv_heads, block_size)
    pool = KvPool(layout, 12, device=CPU)
    tables = np.array([[7, 2, 9], [0, 11, 4]], dtype=np.int64)
    positions = np.tile(np.arange(3 * block_size), 2)
    blocks = tables.repeat(block_size, axis=1).reshape(-1)
    slots = pool.slot_rows(blocks, positions % block_size)
    written = torch.randn(3, len(blocks), 2 * num_kv_heads, 6)
    for layer in range(3):
        pool.write(slots[layer], written[layer], layer)
    rows = pool.gather_rows(tables)
    for layer in range(3):
        keys, values = pool.gather(rows[layer], 2, layer)
        expected = written[layer].view(2, 3 * block_size, 2, num_kv_heads, 6)
        expected = expected.permute(2, 0, 3, 1, 4).reshape(2, 2 * num_kv_heads, -1, 6)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])


def test_token_lies_where_the_layout_says() -> None:
    layout = make_layout(2)
    pool = KvPool(layout, 5, device=CPU)
    slots = pool.slot_rows(np.array([3]), np.array([2]))
    pool.write(slots[1], torch.arange(24.0).view(1, 4, 6), 1)
    assert torch.equal(pool.blocks[3, 0, 1, 0, 2], torch.arange(0.0, 6.0))
    assert torch.equal(pool.blocks[3, 1, 1, 0, 2], torch.arange(6.0, 12.0))
    assert torch.equal(pool.blocks[3, 0, 1, 1, 2], torch.arange(12.0, 18.0))
    assert torch.equal(pool.blocks[3, 1, 1, 1, 2], torch.arange(18.0, 24.0))
    assert int((pool.blocks != 0).sum()) == 23


def test_given_memory_is_the_pool() -> None:
    layout = make_layout(1)
    with mmap.mmap(-1, 2 * layout.block_bytes) as memory:
        view = memoryview(memory)
        pool = KvPool(layout, 2, memory=view, device=CPU)
        pool.blocks[1].fill_(1.0)
        assert pool.num_bytes == 2 * layout.block_bytes
        halves = np.frombuffer(view, dtype=np.float32).reshape(2, -1)
        assert pool.address == halves.ctypes.data
        assert (halves[0] == 0.0).all() and (halves[1] == 1.0).all()
        del pool, halves
        view.release()


def test_too_little_memory_is_refused() -> None:
    layout = make_layout(1)
    memory = memoryview(bytearray(layout.block_bytes))
    with pytest.raises(ConfigError, match=f"needs {2 * layout.block_bytes} bytes"):
        KvPool(layout, 2, memory=memory, device=CPU)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="cuda"):
        KvPool(make_layout(1), 1, device=torch.device("cuda"))
