"""One step's integers, packed on the host and copied to the device in one piece.

Rows are the step's tokens: first sequences that compute a single token, then chunks. What a
captured graph reads lies at fixed addresses: `[5, max_num_seqs]` row arrays and the block tables.
Host buffers alternate, since the copy of one step may still wait on the device while the next
step is packed. Block tables stay on the device; only rows that changed are sent. A step that is one
chunk alone can be padded too; arrays of the same sizes always lie at the same addresses.

Not known here: models, kernels, sampling.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.core.block import BlockId
from baton.engine.batch import ScoredSpan, SequenceSlice
from baton.engine.gpu.device import ComputeDevice

NUM_HOST_BUFFERS = 2
"""Steps that are packed but not yet waited for."""
NO_SLOT = -1
ALIGNED_ITEMS = 4
"""Arrays start at multiples of 16 bytes: kernels are compiled anew for pointers that do not."""
_ROW_ARRAYS = 5
_PENDING_ROW, _SLOT_ROW = 1, 3
_CHUNK_ROW_ARRAYS = 4

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Device tensors of one step, int32."""

    token_ids: Tensor
    """[num_rows]; not looked at where `pending_index` says otherwise."""
    pending_index: Tensor
    """[num_rows] place of the token among the last sampled ones, -1: take `token_ids`."""
    positions: Tensor
    """[num_rows]"""
    slot_mapping: Tensor
    """[num_rows] block_id * block_size + offset, -1 for padding rows."""
    seq_lens: Tensor
    """[num_seqs] tokens of context, this step's included; 0 for padding rows."""
    chunk_seq_lens: Tensor
    """The same of the chunks alone."""
    block_tables: Tensor
    """[num_seqs, max_num_blocks]"""
    num_decode_rows: int
    """Leading rows that are sequences of one token each."""
    cu_query_lens: Tensor | None
    """[num_chunks + 1] within the rows after the decode rows; None without chunks."""
    max_query_len: int
    sampled_rows: Tensor | None
    """Rows whose logits are wanted, int64; None in a decode step: all rows, in order."""
    sampled_seqs: Tensor
    """The sequences they belong to, int64, parallel to `sampled_rows`; empty in a decode step."""
    num_sampled: int
    scored_rows: Tensor | None = None
    """Rows whose distribution of the next token is wanted, int64."""


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The device's inputs and how they map back to the scheduled batch."""

    inputs: StepInputs
    sampled: list[int]
    """For each row of logits, the index of its slice."""
    scored: list[ScoredSpan]
    """Those of `scored_rows`, in order."""


class InputStaging:
    """Packs steps; owns the buffers. One per rank."""

    def __init__(
        self,
        device: ComputeDevice,
        *,
        max_num_seqs: int,
        max_num_tokens: int,
        max_num_blocks: int,
        block_size: int,
    ) -> None:
        """`max_num_blocks` per sequence; `max_num_tokens` of one step."""
        self._block_size = block_size
        max_num_blocks = -(-max_num_blocks // ALIGNED_ITEMS) * ALIGNED_ITEMS
        capacity = 4 * max_num_tokens + (5 + _ROW_ARRAYS) * max_num_seqs + 8 * ALIGNED_ITEMS + 1
        self._host = [device.host_buffer((capacity,), torch.int32) for _ in range(NUM_HOST_BUFFERS)]
        self._host_tables = [
            device.host_buffer((max_num_seqs * (max_num_blocks + 1),), torch.int32)
            for _ in range(NUM_HOST_BUFFERS)
        ]
        self._turn = 0
        where = device.device
        self._mixed = torch.zeros(capacity, dtype=torch.int32, device=where)
        self._rows = torch.zeros((_ROW_ARRAYS, max_num_seqs), dtype=torch.int32, device=where)
        # Until the first step all rows are padding: a graph is captured over them.
        self._rows[_PENDING_ROW] = NO_SLOT
        self._rows[_SLOT_ROW] = NO_SLOT
        self._tables = torch.zeros((max_num_seqs, max_num_blocks), dtype=torch.int32, device=where)
        self._changes = torch.zeros(
            max_num_seqs * (max_num_blocks + 1), dtype=torch.int32, device=where
        )
        self._no_seqs = torch.zeros(0, dtype=torch.int64, device=where)
        self._first_seq = torch.zeros(1, dtype=torch.int64, device=where)
        self._table_rows: list[tuple[BlockId, ...]] = [()] * max_num_seqs

    def decode_inputs(self, num_rows: int) -> StepInputs:
        """The views that a graph for `num_rows` rows reads; the same tensors each time."""
        token_ids, pending_index, positions, slot_mapping, seq_lens = self._rows[
            :, :num_rows
        ].unbind()
        return StepInputs(
            token_ids=token_ids,
            pending_index=pending_index,
            positions=positions,
            slot_mapping=slot_mapping,
            seq_lens=seq_lens,
            chunk_seq_lens=seq_lens[:0],
            block_tables=self._tables[:num_rows],
            num_decode_rows=num_rows,
            cu_query_lens=None,
            max_query_len=1,
            sampled_rows=None,
            sampled_seqs=self._no_seqs,
            num_sampled=num_rows,
        )

    def pack_decode(
        self, slices: SequenceOf[SequenceSlice], slots: SequenceOf[int], num_rows: int
    ) -> list[int]:
        """Fill `decode_inputs(num_rows)`: one sampled token of each sequence, in order, padded.

        `slots` are the places of the sequences' last samples. Returns what `PackedStep.sampled` is
        of any step.
        """
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        host = self._host[self._turn][: self._rows.numel()].view(_ROW_ARRAYS, -1)
        rows: IntArray = host.numpy()
        count = len(slices)
        rows[:, count:num_rows] = np.array([0, NO_SLOT, 0, NO_SLOT, 0], dtype=np.int32)[:, None]
        positions = np.array([s.first_position for s in slices], dtype=np.int32)
        rows[0, :count] = [s.token_ids[0] for s in slices]
        rows[1, :count] = [
            slot if s.has_pending_token else NO_SLOT for s, slot in zip(slices, slots, strict=True)
        ]
        rows[2, :count] = positions
        rows[3, :count] = np.array([s.block_table[-1] for s in slices], dtype=np.int32) * (
            self._block_size
        ) + (positions % self._block_size)
        rows[4, :count] = positions + 1
        self._rows.copy_(host, non_blocking=True)
        self._send_tables(slices)
        return list(range(count))

    def chunk_inputs(self, num_rows: int) -> StepInputs:
        """As `decode_inputs`, of one chunk that samples, padded to `num_rows`.

        Valid after `pack_chunk` or `reset_chunks`, until any other packing.
        """
        sizes = [num_rows] * _CHUNK_ROW_ARRAYS + [1, 2, 1]
        token_ids, pending, positions, mapping, seq_len, cu_lens, row = self._views(sizes)
        return StepInputs(
            token_ids=token_ids,
            pending_index=pending,
            positions=positions,
            slot_mapping=mapping,
            seq_lens=seq_len,
            chunk_seq_lens=seq_len,
            block_tables=self._tables[:1],
            num_decode_rows=0,
            cu_query_lens=cu_lens,
            max_query_len=num_rows,
            sampled_rows=row.long(),
            sampled_seqs=self._first_seq,
            num_sampled=1,
        )

    def pack_chunk(self, entry: SequenceSlice, slot: int, num_rows: int) -> list[int]:
        """Fill `chunk_inputs(num_rows)`; returns as `pack_decode`."""
        count = len(entry.token_ids)
        ends = np.array([count], dtype=np.int32)
        rows = np.array([0, NO_SLOT, 0, NO_SLOT], dtype=np.int32)[:, None].repeat(num_rows, axis=1)
        rows[:, :count] = self._row_arrays([entry], [slot], ends)
        seq_len = np.array([entry.first_position + count], dtype=np.int32)
        cu_lens = np.array([0, count], dtype=np.int32)
        self._send([*rows, seq_len, cu_lens, ends - 1])
        self._send_tables([entry])
        return [0]

    def reset_chunks(self) -> None:
        """Until the next packing a chunk has padding alone, over which a graph is captured.

        Its rows write to the pool's first slot.
        """
        self._mixed.zero_()

    def pack(self, slices: SequenceOf[SequenceSlice], slots: SequenceOf[int]) -> PackedStep:
        """Any step: single tokens first, then chunks."""
        order = sorted(range(len(slices)), key=lambda i: len(slices[i].token_ids) > 1)
        entries = [slices[i] for i in order]
        num_decode = sum(len(s.token_ids) == 1 for s in entries)
        query_lens = np.array([len(s.token_ids) for s in entries], dtype=np.int32)
        ends = np.cumsum(query_lens, dtype=np.int32)
        sampling = [i for i, s in enumerate(entries) if s.samples]
        first_chunk_row = int(ends[num_decode - 1]) if num_decode else 0
        seq_lens = np.array([s.first_position for s in entries], dtype=np.int32) + query_lens
        arrays = [
            *self._row_arrays(entries, [slots[i] for i in order], ends),
            seq_lens,
            seq_lens[num_decode:],
            np.concatenate(([0], ends[num_decode:] - first_chunk_row)).astype(np.int32),
            ends[sampling] - 1,
            np.array(sampling, dtype=np.int32),
        ]
        token_ids, pending, positions, mapping, *seq_arrays = self._send(arrays)
        lens, chunk_lens, cu_lens, rows, seqs = seq_arrays
        self._send_tables(entries)
        has_chunks = num_decode < len(entries)
        scored = [
            ScoredSpan(order[i], int(end - length), entry.num_scored)
            for i, (entry, end, length) in enumerate(zip(entries, ends, query_lens, strict=True))
            if entry.num_scored
        ]
        is_in_order = not has_chunks and len(sampling) == len(entries)
        inputs = StepInputs(
            token_ids=token_ids,
            pending_index=pending,
            positions=positions,
            slot_mapping=mapping,
            seq_lens=lens,
            chunk_seq_lens=chunk_lens,
            block_tables=self._tables[: len(entries)],
            num_decode_rows=num_decode,
            cu_query_lens=cu_lens if has_chunks else None,
            max_query_len=int(query_lens.max()),
            sampled_rows=None if is_in_order else rows.long(),
            sampled_seqs=self._no_seqs if is_in_order else seqs.long(),
            num_sampled=len(sampling),
            scored_rows=self._scored_rows(scored) if scored else None,
        )
        return PackedStep(inputs, [order[i] for i in sampling], scored)

    def _scored_rows(self, scored: list[ScoredSpan]) -> Tensor:
        """A copy of its own: few requests want it, and those that do can wait for it."""
        rows = [torch.arange(s.first_row, s.first_row + s.num_rows) for s in scored]
        return torch.cat(rows).to(self._mixed.device)

    def _row_arrays(
        self, entries: list[SequenceSlice], slots: list[int], ends: IntArray
    ) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Token ids, pending places, positions and KV slots of all rows."""
        num_rows = int(ends[-1])
        token_ids = np.fromiter((t for s in entries for t in s.token_ids), np.int32, num_rows)
        pending = np.full(num_rows, NO_SLOT, dtype=np.int32)
        positions = np.empty(num_rows, dtype=np.int32)
        mapping = np.empty(num_rows, dtype=np.int32)
        first = 0
        for entry, slot, end in zip(entries, slots, ends.tolist(), strict=True):
            span = np.arange(
                entry.first_position, entry.first_position + end - first, dtype=np.int32
            )
            table = np.array(entry.block_table, dtype=np.int32)
            positions[first:end] = span
            mapping[first:end] = table[span // self._block_size] * self._block_size + (
                span % self._block_size
            )
            if entry.has_pending_token:
                pending[end - 1] = slot
            first = end
        return token_ids, pending, positions, mapping

    def _send(self, arrays: list[IntArray]) -> list[Tensor]:
        """Copy arrays to the device in one piece; returns a view of it for each."""
        self._turn = (self._turn + 1) % NUM_HOST_BUFFERS
        sizes = [array.size for array in arrays]
        starts = _starts(sizes)
        host = self._host[self._turn][: starts[-1]]
        packed: IntArray = host.numpy()
        for array, start in zip(arrays, starts, strict=False):
            packed[start : start + array.size] = array
        self._mixed[: starts[-1]].copy_(host, non_blocking=True)
        return self._views(sizes)

    def _views(self, sizes: list[int]) -> list[Tensor]:
        """Where `_send` puts arrays of these sizes."""
        starts = _starts(sizes)
        return [self._mixed[s : s + size] for s, size in zip(starts, sizes, strict=False)]

    def _send_tables(self, entries: SequenceOf[SequenceSlice]) -> None:
        """Bring the device's first len(entries) block tables up to date."""
        changed = [i for i, entry in enumerate(entries) if self._table_rows[i] != entry.block_table]
        if not changed:
            return
        width = max(len(entries[i].block_table) for i in changed)
        size = len(changed) * (width + 1)
        host = self._host_tables[self._turn][:size]
        flat: IntArray = host.numpy()
        flat[: len(changed)] = changed
        tables = flat[len(changed) :].reshape(len(changed), width)
        for row, i in zip(tables, changed, strict=True):
            table = entries[i].block_table
            row[: len(table)] = table
            row[len(table) :] = 0
            self._table_rows[i] = table
        sent = self._changes[:size]
        sent.copy_(host, non_blocking=True)
        rows = sent[: len(changed)].long()
        self._tables[:, :width].index_copy_(0, rows, sent[len(changed) :].view(-1, width))


def _starts(sizes: list[int]) -> list[int]:
    """Of arrays side by side, each aligned, and the end of the last."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNED_ITEMS) * ALIGNED_ITEMS)
    return starts
