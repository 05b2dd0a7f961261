"""Division of a large 16-bit prefill over programs: tiles, and the steps a tile takes.

A tile is 128 queries of one head, walked from the diagonal backwards in steps of 128 keys. Programs
take tiles in turns, the latest queries, which see most keys, first. See
prefill_attention_specialized.py for who computes what.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

QUERIES = gl.constexpr(64)
"""Of one consumer; a tile has twice as many."""
KEYS = gl.constexpr(128)
"""Of one step."""
BOX = gl.constexpr(64)
"""Dimensions of one bulk copy: 128 bytes, the widest swizzle."""
STAGES = gl.constexpr(2)
"""Steps whose keys and values are in shared memory."""


@gluon.jit
def tile_of(turn, num_tiles):
    """The program's tile of a turn; num_tiles when none is left."""
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    # Later tiles are smaller: dealing them out to and fro evens the programs' shares.
    place = program + (turn % 2) * (num_programs - 1 - 2 * program)
    return gl.minimum(turn * num_programs + place, num_tiles)


@gluon.jit
def work_of(
    tile,
    cu_query_lens_ptr,
    seq_lens_ptr,
    num_seqs,
    num_query_tiles,
    NUM_HEADS: gl.constexpr,
):
    """(head, sequence, first query, queries, their first row, tokens, steps) of a tile.

    No steps where the sequence has fewer queries than the longest.
    """
    head = tile % NUM_HEADS
    seq = tile // NUM_HEADS % num_seqs
    first_query = (num_query_tiles - 1 - tile // NUM_HEADS // num_seqs) * (2 * QUERIES)
    query_begin = gl.load(cu_query_lens_ptr + seq)
    query_len = gl.load(cu_query_lens_ptr + seq + 1) - query_begin
    seq_len = gl.load(seq_lens_ptr + seq)
    num_queries = gl.minimum(query_len - first_query, 2 * QUERIES)
    num_keys = seq_len - query_len + first_query + num_queries
    num_steps = gl.where(num_queries > 0, (num_keys + KEYS - 1) // KEYS, 0)
    return head, seq, first_query, query_len, query_begin, seq_len, num_steps
