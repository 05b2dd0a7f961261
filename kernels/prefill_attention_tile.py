"""Tile shapes of prefill attention: the table in use, and what is worth timing on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """One program's share of the queries, and how it steps through the keys."""

    block_m: int
    """Rows: queries times `pack` heads."""
    block_n: int
    """Keys of one step."""
    num_warps: int
    num_stages: int
    pack: int = 1
    """Query heads of one KV head whose rows share a tile."""
    is_bulk: bool = True
    """By bulk tensor copies where the pool allows it."""
    is_specialized: bool = False
    """By the kernel of specialised warps where it takes the call; else as the rest says."""
    max_registers: int | None = None


def prefill_tile(head_dim: int, element_bytes: int, max_query_len: int, group: int) -> PrefillTile:
    """The largest tiles that fit in shared memory and registers."""
    # With few queries, the heads that share their keys fill the rows.
    pack = group & -group if max_query_len < 128 else 1
    width = triton.next_power_of_2(head_dim)
    if element_bytes == 4:
        return PrefillTile(16 if width > 128 else 32, 16, 4, 1, pack)
    block_m = 128 if max_query_len * pack > 64 else 64
    if width > 128:
        return PrefillTile(block_m, 32 * element_bytes, block_m // 16, 2, pack)
    if element_bytes == 2 and pack == 1:
        return PrefillTile(128, 64, 8, 3, is_specialized=True, max_registers=128)
    return PrefillTile(block_m, 128, block_m // 16, 2, pack)


def candidate_tiles(
    head_dim: int, element_bytes: int, max_query_len: int, group: int
) -> list[PrefillTile]:
    """Tiles worth timing on a GPU; the table's own comes first."""
    width = triton.next_power_of_2(head_dim)
    general = [
        PrefillTile(block_m, block_n, block_m // 16, num_stages, pack, is_bulk, False, registers)
        for block_m, block_n, registers in (
            (64, 64, None), (64, 128, None), (128, 64, None), (128, 64, 128), (128, 128, None),
        )
        for num_stages in (2, 3, 4)
        for pack in sorted({1, group & -group})
        for is_bulk in (True, False)
        if (block_m + 2 * num_stages * block_n) * width * 2 <= 220 * 1024
    ]  # fmt: skip
    table = prefill_tile(head_dim, element_bytes, max_query_len, group)
    return list(dict.fromkeys([table, *general]))
