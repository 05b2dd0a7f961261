"""Sizes that follow from the shape of a KV pool."""

from __future__ import annotations

import pytest

from baton.core.errors import ConfigError
from baton.core.kv_layout import KvLayout

LAYOUT = KvLayout("model", num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype="float16")


def test_pool_holds_the_whole_blocks_of_its_size() -> None:
    assert LAYOUT.block_bytes == 2 * 3 * 2 * 4 * 8 * 2
    assert LAYOUT.num_blocks_in(LAYOUT.block_bytes) == 1
    assert LAYOUT.num_blocks_in(3 * LAYOUT.block_bytes - 1) == 2


def test_pool_below_one_block_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        ConfigError, match=r"kv_cache_bytes 767 is below one block of 768 bytes \(4 tokens\); raise"
    ):
        LAYOUT.num_blocks_in(767)
