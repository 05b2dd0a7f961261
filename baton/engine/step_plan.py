"""One engine step as tensors: which rows are computed, where their KV lies, what is sampled.

Rows are the step's tokens: first the sequences that compute a single token, ordered by length so
that similar ones share an attention call, then the chunks. Everything that all layers share is
computed here once.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.engine.batch import ScoredSpan, SequenceSlice
from baton.engine.kv_cache import IntArray, KvPool
from baton.engine.layers.attention import DecodeGroup, PrefillChunk

MAX_GROUP_BYTES = 8 << 20
"""K and V of one layer that one group gathers: what stays in a last-level cache."""
MAX_PADDING = 1.25
"""Longest over shortest sequence of a group, in blocks, beyond a few blocks of slack."""
PADDING_SLACK_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Input of a model's forward pass. Row order is the plan's own."""

    token_ids: Tensor
    """int64 [num_rows]"""
    positions: Tensor
    """int64 [num_rows]"""
    slot_rows: list[Tensor]
    """Per layer, see KvPool.slot_rows."""
    decode_groups: list[DecodeGroup]
    prefill_chunks: list[PrefillChunk]
    num_decode_rows: int
    """Leading rows that belong to `decode_groups`."""
    sampled_rows: Tensor | None
    """Rows whose logits are wanted; None when they are all rows in order."""
    sampled_groups: list[DecodeGroup]
    """The last layer's queries: only the sampled rows."""
    sampled: list[int]
    """For each row of logits, the index of its slice."""
    scored: list[ScoredSpan]
    """Rows whose distribution of the next token is wanted, in order."""


def build_plan(slices: AbstractSequence[SequenceSlice], pool: KvPool) -> StepPlan:
    """The plan of a non-empty step whose tokens are all known; the same on every rank."""
    order = sorted(range(len(slices)), key=lambda i: _order_key(slices[i]))
    entries = [slices[i] for i in order]
    num_decode = sum(1 for e in entries if len(e.token_ids) == 1)
    contexts = [e.first_position + len(e.token_ids) for e in entries]
    first_rows = np.cumsum([0] + [len(e.token_ids) for e in entries]).tolist()
    tables = [np.array(e.block_table, dtype=np.int64) for e in entries]
    chunks = [
        PrefillChunk(
            first_rows[i],
            len(entries[i].token_ids),
            contexts[i],
            pool.gather_rows(tables[i][None]),
        )
        for i in range(num_decode, len(entries))
    ]
    groups = _group(contexts[:num_decode], tables[:num_decode], pool)
    sampling = [i for i, e in enumerate(entries) if e.samples]
    token_ids, positions, slot_rows = _tokens(entries, tables, pool)
    if len(sampling) == len(entries) == num_decode:
        sampled_rows, sampled_groups = None, groups
    else:
        sampling.sort(key=contexts.__getitem__)
        sampled_rows = torch.tensor([first_rows[i + 1] - 1 for i in sampling], dtype=torch.int64)
        sampled_groups = _group(
            [contexts[i] for i in sampling], [tables[i] for i in sampling], pool
        )
    return StepPlan(
        token_ids=token_ids,
        positions=positions,
        slot_rows=slot_rows,
        decode_groups=groups,
        prefill_chunks=chunks,
        num_decode_rows=num_decode,
        sampled_rows=sampled_rows,
        sampled_groups=sampled_groups,
        sampled=[order[i] for i in sampling],
        scored=[
            ScoredSpan(order[i], first_rows[i], entry.num_scored)
            for i, entry in enumerate(entries)
            if entry.num_scored
        ],
    )


def _order_key(entry: SequenceSlice) -> tuple[bool, int]:
    return len(entry.token_ids) > 1, entry.first_position


def _tokens(
    entries: list[SequenceSlice], tables: list[IntArray], pool: KvPool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Token ids, positions and slots of all rows."""
    token_ids: list[int] = []
    positions: list[IntArray] = []
    blocks: list[IntArray] = []
    block_size = pool.layout.block_size
    for entry, table in zip(entries, tables, strict=True):
        token_ids += entry.token_ids
        first = entry.first_position
        span = np.arange(first, first + len(entry.token_ids), dtype=np.int64)
        positions.append(span)
        blocks.append(table[span // block_size])
    all_positions = np.concatenate(positions)
    slot_rows = pool.slot_rows(np.concatenate(blocks), all_positions % block_size)
    return (
        torch.tensor(token_ids, dtype=torch.int64),
        torch.from_numpy(all_positions),
        slot_rows,
    )


def _group(contexts: list[int], tables: list[IntArray], pool: KvPool) -> list[DecodeGroup]:
    """Split sequences, ordered by length, where padding or the gathered bytes grow too large."""
    block_bytes = pool.num_kv_heads * pool.layout.head_bytes // pool.layout.num_layers
    groups: list[DecodeGroup] = []
    first = 0
    for i in range(1, len(contexts) + 1):
        if i < len(contexts):
            longest, shortest = len(tables[i]), len(tables[first])
            padded_bytes = longest * (i - first + 1) * block_bytes
            if (
                longest <= shortest * MAX_PADDING + PADDING_SLACK_BLOCKS
                and padded_bytes <= MAX_GROUP_BYTES
            ):
                continue
        groups.append(_decode_group(first, contexts[first:i], tables[first:i], pool))
        first = i
    return groups


def _decode_group(
    first_row: int, contexts: list[int], tables: list[IntArray], pool: KvPool
) -> DecodeGroup:
    """Padding repeats a sequence's own first block, so that it holds finite numbers."""
    num_blocks = len(tables[-1])
    padded = np.empty((len(tables), num_blocks), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
        row[len(table) :] = table[0]
    length = num_blocks * pool.layout.block_size
    mask = None
    if contexts[0] < length and len(contexts) > 1:
        is_padding = torch.arange(length)[None] >= torch.tensor(contexts)[:, None]
        mask = torch.zeros(is_padding.shape, dtype=pool.dtype)
        mask = mask.masked_fill_(is_padding, float("-inf"))[:, None]
    return DecodeGroup(first_row, len(tables), pool.gather_rows(padded), contexts[-1], mask)
