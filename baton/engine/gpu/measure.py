"""What a rank's weights, activations and graphs take of a GPU's memory, measured on it.

The largest step is run once over a pool of just the blocks it needs, and the allocator's peak is
read. Not known here: what is done with the numbers (`memory_plan`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from baton.core.block import BlockId
from baton.core.request import RequestId
from baton.engine.batch import SequenceSlice
from baton.engine.gpu.device import ComputeDevice
from baton.engine.gpu.memory_plan import GRAPH_BYTES


def largest_step(
    *, max_num_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> list[SequenceSlice]:
    """A step of `max_num_tokens` tokens in sequences as long as they may be, each sampling.

    Single tokens fill the remaining places of the step, so that it computes as many logits as a
    step ever does.
    """
    lengths: list[int] = []
    left = max_num_tokens
    while left and len(lengths) < max_num_seqs:
        places_left = max_num_seqs - len(lengths) - 1
        length = max(1, min(max_model_len, left - places_left))
        lengths.append(length)
        left -= length
    slices: list[SequenceSlice] = []
    first_block = 0
    for index, length in enumerate(lengths):
        num_blocks = -(-length // block_size)
        slices.append(
            SequenceSlice(
                request_id=RequestId(f"memory-{index}"),
                first_position=0,
                token_ids=(0,) * length,
                has_pending_token=False,
                block_table=tuple(BlockId(first_block + i) for i in range(num_blocks)),
                samples=True,
            )
        )
        first_block += num_blocks
    return slices


def warm_up_slice(num_tokens: int, block_size: int) -> SequenceSlice:
    """A whole prompt in the first blocks of the pool, before they hold anything of value."""
    return SequenceSlice(
        request_id=RequestId("warm-up"),
        first_position=0,
        token_ids=(0,) * num_tokens,
        has_pending_token=False,
        block_table=tuple(BlockId(i) for i in range(-(-num_tokens // block_size))),
        samples=True,
    )


def decode_counts(max_num_seqs: int) -> list[int]:
    """Powers of two of sequences that leave a place for a chunk in the same step."""
    counts = [1]
    while 2 * counts[-1] < max_num_seqs:
        counts.append(2 * counts[-1])
    return [count for count in counts if count < max_num_seqs]


def warm_up_mix(count: int, block_size: int) -> list[SequenceSlice]:
    """`count` single tokens beside a chunk of two, all in the first block of the pool."""
    block = (BlockId(0),)
    singles = [
        SequenceSlice(RequestId(f"warm-up-{i}"), 1, (0,), False, block, True) for i in range(count)
    ]
    return [*singles, warm_up_slice(2, block_size)]


def num_blocks_of(slices: list[SequenceSlice]) -> int:
    """Blocks that the slices refer to."""
    return 1 + max(block for s in slices for block in s.block_table)


def peak_bytes(device: ComputeDevice, run: Callable[[], object]) -> int:
    """Memory that `run` takes at its peak beyond what is allocated before it."""
    if device.device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device.device)
    torch.cuda.reset_peak_memory_stats(device.device)
    run()
    torch.cuda.synchronize(device.device)
    return torch.cuda.max_memory_allocated(device.device) - before


def give_back_memory(device: ComputeDevice) -> None:
    """What nothing refers to any more, to the driver."""
    gc.collect()
    if device.device.type == "cuda":
        torch.cuda.empty_cache()


def expected_graph_bytes(
    activation_bytes: int,
    max_num_tokens: int,
    decode_buckets: list[int],
    chunk_buckets: list[int],
    logits_row_bytes: int,
) -> int:
    """Graphs share one pool of the largest one's size and one buffer of logits; each also has
    nodes in the driver.

    A step's activations are in proportion to its rows.
    """
    buckets = [*decode_buckets, *chunk_buckets]
    if not buckets:
        return 0
    shared = activation_bytes * max(buckets) // max(max_num_tokens, 1)
    num_logits = max(decode_buckets, default=0)
    return shared + num_logits * logits_row_bytes + GRAPH_BYTES * len(buckets)
