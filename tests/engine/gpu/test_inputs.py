"""A step's integers as the device sees them, rebuilt here by hand from the slices."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from baton.core.block import BlockId
from baton.core.request import RequestId
from baton.engine.batch import SequenceSlice
from baton.engine.gpu.device import InterpretedDevice
from baton.engine.gpu.inputs import InputStaging, StepInputs

BLOCK_SIZE = 4


def staging(max_num_seqs: int = 6, max_num_tokens: int = 64) -> InputStaging:
    return InputStaging(
        InterpretedDevice(),
        max_num_seqs=max_num_seqs,
        max_num_tokens=max_num_tokens,
        max_num_blocks=16,
        block_size=BLOCK_SIZE,
    )


def make_slice(
    name: str,
    first: int,
    count: int,
    *,
    rng: random.Random,
    samples: bool = True,
    is_pending: bool = False,
) -> SequenceSlice:
    num_blocks = -(-(first + count) // BLOCK_SIZE)
    return SequenceSlice(
        RequestId(name),
        first,
        tuple(rng.randrange(1, 300) for _ in range(count)),
        is_pending,
        tuple(BlockId(rng.randrange(1000)) for _ in range(num_blocks)),
        samples,
    )


def table_of(tables: Tensor, row: int, entry: SequenceSlice) -> list[int]:
    values: list[int] = tables[row, : len(entry.block_table)].tolist()
    return values


def expected_slots(entry: SequenceSlice) -> list[int]:
    positions = range(entry.first_position, entry.first_position + len(entry.token_ids))
    return [entry.block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]


def test_decode_rows_keep_order_and_are_padded() -> None:
    rng = random.Random(1)
    entries = [
        make_slice("a", 9, 1, rng=rng),
        make_slice("b", 0, 1, rng=rng, is_pending=True),
        make_slice("c", 31, 1, rng=rng, is_pending=True),
    ]
    stage = staging()
    sampled = stage.pack_decode(entries, [4, 5, 2], 6)
    inputs = stage.decode_inputs(6)
    assert sampled == [0, 1, 2]
    assert inputs.token_ids.tolist()[:3] == [e.token_ids[0] for e in entries]
    assert inputs.pending_index.tolist() == [-1, 5, 2, -1, -1, -1]
    assert inputs.positions.tolist()[:3] == [9, 0, 31]
    assert inputs.slot_mapping.tolist() == [
        *(s for e in entries for s in expected_slots(e)),
        *[-1] * 3,
    ]
    assert inputs.seq_lens.tolist() == [10, 1, 32, 0, 0, 0]
    for row, entry in enumerate(entries):
        assert table_of(inputs.block_tables, row, entry) == list(entry.block_table)


def test_decode_inputs_lie_at_fixed_addresses() -> None:
    rng = random.Random(2)
    stage = staging()
    captured = stage.decode_inputs(4)
    addresses = [
        t.data_ptr()
        for t in (captured.token_ids, captured.positions, captured.seq_lens, captured.block_tables)
    ]
    assert captured.slot_mapping.tolist() == [-1] * 4
    for length in (3, 8, 20):
        stage.pack_decode([make_slice("a", length, 1, rng=rng)], [0], 4)
        inputs = stage.decode_inputs(4)
        assert addresses == [
            t.data_ptr()
            for t in (inputs.token_ids, inputs.positions, inputs.seq_lens, inputs.block_tables)
        ]
        assert captured.seq_lens.tolist() == [length + 1, 0, 0, 0]


def test_single_tokens_come_before_chunks() -> None:
    rng = random.Random(3)
    entries = [
        make_slice("chunk", 8, 5, rng=rng, samples=False),
        make_slice("token", 12, 1, rng=rng, is_pending=True),
        make_slice("whole", 0, 7, rng=rng),
    ]
    packed = staging().pack(entries, [0, 3, 1])
    inputs = packed.inputs
    order = [entries[1], entries[0], entries[2]]
    assert inputs.num_decode_rows == 1
    assert inputs.token_ids.tolist() == [t for e in order for t in e.token_ids]
    assert inputs.pending_index.tolist() == [3, *[-1] * 12]
    assert inputs.slot_mapping.tolist() == [s for e in order for s in expected_slots(e)]
    assert inputs.seq_lens.tolist() == [13, 13, 7]
    assert inputs.cu_query_lens is not None
    assert inputs.cu_query_lens.tolist() == [0, 5, 12]
    assert inputs.max_query_len == 7
    assert packed.sampled == [1, 2]
    assert inputs.sampled_rows is not None
    assert inputs.sampled_rows.tolist() == [0, 12]
    assert inputs.sampled_seqs.tolist() == [0, 2]


def test_a_lone_chunk_is_padded_and_lies_at_fixed_addresses() -> None:
    rng = random.Random(5)
    stage = staging()
    stage.reset_chunks()
    captured = stage.chunk_inputs(12)
    assert captured.seq_lens.tolist() == [0]
    for first, count in ((0, 12), (9, 5), (30, 1)):
        # What other steps leave behind is overwritten.
        stage.pack([make_slice("other", 0, 20, rng=rng), make_slice("b", 0, 9, rng=rng)], [3, 2])
        entry = make_slice("a", first, count, rng=rng, is_pending=count == 1)
        assert stage.pack_chunk(entry, 4, 12) == [0]
        inputs = stage.chunk_inputs(12)
        padding = 12 - count
        assert inputs.token_ids.tolist()[:count] == list(entry.token_ids)
        pending = [*[-1] * (count - 1), 4 if count == 1 else -1]
        assert inputs.pending_index.tolist() == [*pending, *[-1] * padding]
        assert inputs.positions.tolist()[:count] == list(range(first, first + count))
        assert inputs.slot_mapping.tolist() == [*expected_slots(entry), *[-1] * padding]
        assert inputs.seq_lens.tolist() == inputs.chunk_seq_lens.tolist() == [first + count]
        assert inputs.cu_query_lens is not None
        assert inputs.cu_query_lens.tolist() == [0, count]
        assert inputs.sampled_rows is not None
        assert inputs.sampled_rows.tolist() == [count - 1]
        assert (inputs.sampled_seqs.tolist(), inputs.num_sampled) == ([0], 1)
        assert table_of(inputs.block_tables, 0, entry) == list(entry.block_table)
        assert addresses_of(inputs) == addresses_of(captured)


def addresses_of(inputs: StepInputs) -> list[int]:
    assert inputs.cu_query_lens is not None
    rows = (inputs.token_ids, inputs.pending_index, inputs.positions, inputs.slot_mapping)
    return [t.data_ptr() for t in (*rows, inputs.seq_lens, inputs.cu_query_lens)]


def test_a_step_that_samples_nothing_says_so() -> None:
    packed = staging().pack([make_slice("a", 0, 8, rng=random.Random(4), samples=False)], [0])
    assert packed.sampled == []
    assert packed.inputs.num_sampled == 0


def test_block_tables_on_the_device_follow_random_steps() -> None:
    """Only changed rows are sent; every row of every step must nevertheless be right."""
    rng = random.Random(6)
    stage = staging()
    alive: list[SequenceSlice] = []
    for step in range(2_000):
        grown = []
        for entry in alive:
            position = entry.first_position + len(entry.token_ids)
            if rng.random() < 0.05 or position >= 60:
                continue
            table = entry.block_table
            if position // BLOCK_SIZE >= len(table):
                table = (*table, BlockId(rng.randrange(1000)))
            grown.append(
                SequenceSlice(entry.request_id, position, (7,), rng.random() < 0.5, table, True)
            )
        while len(grown) < 6 and rng.random() < 0.3:
            count = rng.randint(1, 6)
            grown.append(make_slice(f"{step}-{len(grown)}", 0, count, rng=rng))
        if rng.random() < 0.2:
            rng.shuffle(grown)
        alive = grown
        if not alive:
            continue
        slots = list(range(len(alive)))
        if all(len(e.token_ids) == 1 for e in alive):
            stage.pack_decode(alive, slots, 6)
            inputs, order = stage.decode_inputs(6), alive
        else:
            inputs = stage.pack(alive, slots).inputs
            order = sorted(alive, key=lambda e: len(e.token_ids) > 1)
        for row, entry in enumerate(order):
            assert table_of(inputs.block_tables, row, entry) == list(entry.block_table)
        assert inputs.seq_lens.tolist()[: len(order)] == [
            e.first_position + len(e.token_ids) for e in order
        ]


def test_host_buffers_alternate() -> None:
    """The copy of one step may still be waiting while the next is packed."""
    stage = staging()
    rng = random.Random(7)
    used = []
    for _ in range(4):
        stage.pack_decode([make_slice("a", 5, 1, rng=rng)], [0], 1)
        used.append(stage._turn)
    assert used[0] != used[1]
    assert used[:2] == used[2:]
    assert stage._host[0].data_ptr() != stage._host[1].data_ptr()
    assert torch.equal(
        stage._rows[:, :1].cpu(), stage._host[stage._turn][: stage._rows.numel()].view(5, -1)[:, :1]
    )
