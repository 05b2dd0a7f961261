"""The device side of decode attention: share of a program, online softmax, merge of parts.

See decode_attention.py for what is computed and why the work is divided this way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kernels.attention_steps import LN_2, LOG2_E, as_operand, score_scale_of
from kernels.decode_attention_tiles import attend_tiles, blocks_of_tile
from kernels.decode_new_token import (
    add_new_token,
    as_stored,
    load_angles,
    load_rotated,
    score_new_token,
)


@triton.jit
def _merge_parts(
    partial_out_ptr,  # [2 * num_programs, group, head_dim]
    partial_lse_ptr,  # [2 * num_programs, group]
    first_program,
    last_program,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Softmax state of the programs [first, last] together, always summed in the same order."""
    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    in_row = (rows[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(first_program, last_program + 1, BLOCK_S):
        program = first + tl.arange(0, BLOCK_S)
        is_part = program <= last_program
        slot = 2 * program + (program == first_program).to(tl.int32)
        lse = tl.load(
            partial_lse_ptr + slot[:, None] * GROUP + rows[None, :],
            mask=is_part[:, None] & (rows < GROUP)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [BLOCK_S, BLOCK_R]
        lse = tl.where(is_part[:, None], lse, float("-inf"))
        part = tl.load(
            partial_out_ptr
            + (slot[:, None, None] * GROUP + rows[None, :, None]) * HEAD_DIM
            + dims[None, None, :],
            mask=is_part[:, None, None] & in_row[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [BLOCK_S, BLOCK_R, BLOCK_D]
        highest_now = tl.maximum(highest, tl.max(lse, 0))
        weight = tl.exp2(lse - highest_now[None, :])
        old = tl.exp2(highest - highest_now)
        total = total * old + tl.sum(weight, 0)
        acc = acc * old[:, None] + tl.sum(part * weight[:, :, None], 0)
        highest = highest_now
    return highest, total, acc


@triton.jit
def _store_result(
    out_ptr,  # [head_dim] of the first head of the group
    lse_ptr,  # [num_heads] of the sequence, or None
    sinks_ptr,  # [num_heads], or None
    first_head,
    highest,  # [BLOCK_R]
    total,  # [BLOCK_R]
    acc,  # [BLOCK_R, BLOCK_D]
    stride_out_head: tl.int64,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    in_group = rows < GROUP
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + first_head + rows, mask=in_group, other=0.0) * LOG2_E
        # The sink may lie far above every score: the larger of both is the anchor.
        highest_now = tl.maximum(highest, sink)
        old = tl.exp2(highest - highest_now)
        total = total * old + tl.exp2(sink - highest_now)
        acc = acc * old[:, None]
        highest = highest_now
    tl.store(
        out_ptr + rows[:, None] * stride_out_head + dims[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=in_group[:, None] & (dims < HEAD_DIM)[None, :],
    )
    if lse_ptr is not None:
        tl.store(lse_ptr + first_head + rows, (highest + tl.log2(total)) * LN_2, mask=in_group)


@triton.jit
def _store_empty_rows(
    out_ptr,
    lse_ptr,
    seqs,
    seq_lens,
    num_seqs,
    stride_out_seq: tl.int64,
    stride_out_head: tl.int64,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros for the sequences without context, dealt out over the programs."""
    dims = tl.arange(0, BLOCK_D)
    seq = tl.program_id(0)
    while seq < num_seqs:
        if tl.sum(tl.where(seqs == seq, seq_lens, 0), 0) == 0:
            for first_head in range(0, NUM_HEADS, BLOCK_G):
                heads = first_head + tl.arange(0, BLOCK_G)
                tl.store(
                    out_ptr
                    + seq.to(tl.int64) * stride_out_seq
                    + heads[:, None] * stride_out_head
                    + dims[None, :],
                    tl.zeros([BLOCK_G, BLOCK_D], out_ptr.dtype.element_ty),
                    mask=(heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :],
                )
                if lse_ptr is not None:
                    tl.store(
                        lse_ptr + seq * NUM_HEADS + heads,
                        tl.full([BLOCK_G], float("-inf"), tl.float32),
                        mask=heads < NUM_HEADS,
                    )
        seq += tl.num_programs(0)


@triton.jit
def _num_sharers(all_tiles, num_pairs, min_tiles):
    """Programs that get a share of the tiles of `num_pairs` (sequence, KV head)."""
    # A short pair of its own costs less than merging; a tile each is best for longer ones.
    most = tl.where(all_tiles > min_tiles * num_pairs, all_tiles, num_pairs)
    sharers = tl.minimum(most, tl.num_programs(0))
    # As many to each pair, where that leaves few without work: a share that goes on in another
    # pair fills its pipeline of tiles, and merges, once more.
    whole = sharers // tl.maximum(num_pairs, 1) * num_pairs
    return tl.where(4 * whole >= 3 * sharers, whole, sharers)


@triton.jit(do_not_specialize=["num_seqs"])
def decode_attention_kernel(
    out_ptr,  # [num_seqs, num_heads, head_dim]
    lse_ptr,  # [num_seqs, num_heads] float32, or None
    query_ptr,  # [num_seqs, num_heads, head_dim]
    kv_ptr,  # [num_blocks, num_kv_heads, 2, block_size, head_dim], one layer; int16 if IS_PAIRED
    block_tables_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    sinks_ptr,  # [num_heads] float32, or None
    k_scale_ptr,  # [num_kv_heads] float32, or None
    v_scale_ptr,  # [num_kv_heads] float32, or None
    partial_out_ptr,  # [2 * num_programs, group, head_dim] float32
    partial_lse_ptr,  # [2 * num_programs, group] float32, log2
    arrivals_ptr,  # [num_seqs * num_kv_heads] int32, zeros before and after
    positions_ptr,  # [num_seqs] of the new tokens; None: K and V are in the pool, queries rotated
    cos_sin_ptr,  # [max_positions, head_dim] float32
    slot_mapping_ptr,  # [num_seqs]
    q_norm_ptr,  # [head_dim], or None
    k_norm_ptr,  # [head_dim], or None
    num_seqs,
    min_tiles,
    scale,
    soft_cap,
    sliding_window,
    eps,
    stride_out_seq: tl.int64,
    stride_out_head: tl.int64,
    stride_query_seq: tl.int64,
    stride_query_head: tl.int64,
    stride_block: tl.int64,
    stride_kv_head: tl.int64,
    stride_kv: tl.int64,
    stride_token: tl.int64,
    stride_table: tl.int64,
    stride_cos_sin: tl.int64,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    KV_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TOKEN_ALIGNMENT: tl.constexpr,
    INDEX_DTYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    # program -> an equal share of the tiles of all (sequence, KV head), in that order
    program = tl.program_id(0)
    if USE_PDL:
        # The next kernel is not let in before the end: its programs would take the room of this
        # one's. At one row of 8k tokens that doubles the time between the kernels around it.
        gdc_wait()
    seqs = tl.arange(0, BLOCK_B)
    seq_lens = tl.load(seq_lens_ptr + seqs, mask=seqs < num_seqs, other=0)  # [BLOCK_B]
    IS_FUSED: tl.constexpr = positions_ptr is not None
    NUM_NEW: tl.constexpr = 1 if IS_FUSED else 0
    # Fused, the new token is not in the pool yet; its sequence has a tile for it all the same.
    num_tiles = tl.cdiv(tl.maximum(seq_lens - NUM_NEW, 0), BLOCK_N)
    if HAS_WINDOW:
        num_tiles -= tl.maximum(seq_lens - sliding_window, 0) // BLOCK_N
    if IS_FUSED:
        num_tiles = tl.where(seq_lens > 0, tl.maximum(num_tiles, 1), 0)
    ends = tl.cumsum(num_tiles, 0) * NUM_KV_HEADS  # [BLOCK_B] tiles up to a sequence's last
    all_tiles = (tl.sum(num_tiles, 0) * NUM_KV_HEADS).to(INDEX_DTYPE)
    num_pairs = tl.sum((seq_lens > 0).to(tl.int32), 0) * NUM_KV_HEADS
    sharers = _num_sharers(all_tiles, num_pairs, min_tiles).to(INDEX_DTYPE)
    begin = tl.zeros([], INDEX_DTYPE)
    end = tl.zeros([], INDEX_DTYPE)
    if program < sharers:
        begin = program * all_tiles // sharers
        end = (program + 1) * all_tiles // sharers

    rows = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    in_query = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    while begin < end:
        seq = tl.sum((ends <= begin).to(tl.int32), 0)
        is_seq = seqs == seq
        seq_len = tl.sum(tl.where(is_seq, seq_lens, 0), 0)
        seq_tiles = tl.sum(tl.where(is_seq, num_tiles, 0), 0)
        seq_begin = tl.sum(tl.where(is_seq, ends, 0), 0) - seq_tiles * NUM_KV_HEADS
        kv_head = (begin - seq_begin).to(tl.int32) // seq_tiles
        head_begin = (seq_begin + kv_head * seq_tiles).to(INDEX_DTYPE)
        head_end = head_begin + seq_tiles
        stop = tl.minimum(end, head_end)
        first_token = tl.zeros([], tl.int32)
        if HAS_WINDOW:
            first_token = tl.maximum(seq_len - sliding_window, 0)
        first_tile = (begin - head_begin).to(tl.int32) + first_token // BLOCK_N
        last_tile = first_tile + (stop - begin).to(tl.int32)
        first_head = kv_head * GROUP
        kv_at = kv_ptr + kv_head.to(tl.int64) * stride_kv_head
        table_at = block_tables_ptr + seq.to(tl.int64) * stride_table
        num_stored = seq_len - NUM_NEW
        blocks = blocks_of_tile(table_at, first_tile, num_stored, BLOCK_SIZE, BLOCK_N)

        token_ptr = query_ptr + seq.to(tl.int64) * stride_query_seq
        query_at = token_ptr + (first_head + rows)[:, None] * stride_query_head
        if IS_FUSED:
            cos, sin = load_angles(
                cos_sin_ptr, tl.load(positions_ptr + seq), stride_cos_sin, HEAD_DIM, BLOCK_D
            )
            query = load_rotated(
                query_at, (rows < GROUP)[:, None], cos, sin, q_norm_ptr, eps, HEAD_DIM, BLOCK_D
            ).to(query_ptr.dtype.element_ty)
            new_key_at = token_ptr + (NUM_KV_HEADS * GROUP + kv_head) * stride_query_head
            one = tl.zeros([1, 1], tl.int32)
            key = load_rotated(
                new_key_at + one, one == 0, cos, sin, k_norm_ptr, eps, HEAD_DIM, BLOCK_D
            )
            key = as_stored(key, k_scale_ptr, kv_head, KV_DTYPE)
            value = tl.load(
                new_key_at + NUM_KV_HEADS * stride_query_head + dims[None, :],
                mask=(dims < HEAD_DIM)[None, :],
                other=0.0,
            ).to(tl.float32)
            value = as_stored(value, v_scale_ptr, kv_head, KV_DTYPE)
            pool_slot = tl.load(slot_mapping_ptr + seq).to(tl.int64)
        else:
            query = tl.load(query_at + dims[None, :], mask=in_query, other=0.0)
        # [BLOCK_G, BLOCK_D]
        query = as_operand(query, COMPUTE_DTYPE, query_ptr.dtype.element_ty)
        score_scale = score_scale_of(scale, k_scale_ptr, kv_head, HAS_SOFT_CAP)
        if IS_FUSED:
            new_score = score_new_token(query, key, score_scale, soft_cap, HAS_SOFT_CAP)
        highest, total, acc = attend_tiles(
            query, kv_at, table_at, blocks, first_tile, last_tile, num_stored, first_token,
            score_scale, soft_cap, stride_block, stride_kv, stride_token,
            BLOCK_SIZE, HEAD_DIM, BLOCK_G, BLOCK_N, BLOCK_D, HAS_WINDOW, HAS_SOFT_CAP,
            IS_FUSED, PRECISION, IS_PAIRED, INTERPRETED, TOKEN_ALIGNMENT, NUM_STAGES,
        )  # fmt: skip
        if IS_FUSED:
            is_owner = stop == head_end
            new_score = tl.where(is_owner, new_score, float("-inf"))
            highest, total, acc = add_new_token(highest, total, acc, new_score, value)
            key_at = kv_at + pool_slot // BLOCK_SIZE * stride_block
            key_at += pool_slot % BLOCK_SIZE * stride_token
            value_at = key_at + stride_kv
            if IS_PAIRED:
                key_at = key_at.to(tl.pointer_type(KV_DTYPE), bitcast=True)
                value_at = value_at.to(tl.pointer_type(KV_DTYPE), bitcast=True)
            is_stored = (dims < HEAD_DIM)[None, :] & is_owner & (pool_slot >= 0)
            tl.store(key_at + dims[None, :], key, mask=is_stored)
            tl.store(value_at + dims[None, :], value, mask=is_stored)
        if v_scale_ptr is not None:
            acc *= tl.load(v_scale_ptr + kv_head)

        out_at = out_ptr + seq.to(tl.int64) * stride_out_seq + first_head * stride_out_head
        lse_at = lse_ptr
        if lse_ptr is not None:
            lse_at = lse_ptr + seq * (NUM_KV_HEADS * GROUP)
        first_program = ((head_begin + 1) * sharers - 1) // all_tiles
        last_program = (head_end * sharers - 1) // all_tiles
        if first_program == last_program:
            _store_result(
                out_at, lse_at, sinks_ptr, first_head, highest, total, acc,
                stride_out_head, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D,
            )  # fmt: skip
        else:
            slot = 2 * program + (program == first_program).to(tl.int32)
            tl.store(
                partial_out_ptr + (slot * GROUP + rows[:, None]) * HEAD_DIM + dims[None, :],
                acc / total[:, None],
                mask=in_query,
            )
            tl.store(
                partial_lse_ptr + slot * GROUP + rows, highest + tl.log2(total), mask=rows < GROUP
            )
            # Every thread's part is written before one thread announces it to the other programs.
            tl.debug_barrier()
            arrivals_at = arrivals_ptr + seq * NUM_KV_HEADS + kv_head
            arrived = tl.atomic_add(arrivals_at, 1, sem="acq_rel", scope="gpu")
            if arrived == last_program - first_program:
                tl.debug_barrier()
                all_highest, all_total, all_acc = _merge_parts(
                    partial_out_ptr, partial_lse_ptr,
                    first_program.to(tl.int32), last_program.to(tl.int32),
                    GROUP, HEAD_DIM, BLOCK_S, BLOCK_R, BLOCK_D,
                )  # fmt: skip
                _store_result(
                    out_at, lse_at, sinks_ptr, first_head, all_highest, all_total, all_acc,
                    stride_out_head, GROUP, HEAD_DIM, BLOCK_R, BLOCK_D,
                )  # fmt: skip
                tl.store(arrivals_at, 0)
        begin = stop
    _store_empty_rows(
        out_ptr, lse_ptr, seqs, seq_lens, num_seqs, stride_out_seq, stride_out_head,
        NUM_KV_HEADS * GROUP, HEAD_DIM, BLOCK_G, BLOCK_D,
    )  # fmt: skip
