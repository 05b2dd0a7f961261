"""What the GPU engine still compiles after its warm-up; a script for tests.

    warm_up_report.py FOLDER

FOLDER holds a checkpoint. Prints the number of kernels that starting compiles, then the names of
those that random steps compile after it, one a line. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

from baton.core.block import BlockId
from baton.core.request import RequestId
from baton.engine.batch import SequenceSlice
from baton.engine.communicator import SingleCommunicator
from baton.engine.config import EngineConfig
from baton.engine.gpu.build import RankBuilder
from baton.engine.gpu.device import InterpretedDevice
from baton.engine.gpu.measure import warm_up_slice
from hopper_compiler import recording_compilations

NUM_STEPS = 80
MAX_NUM_SEQS = 32
MAX_NUM_TOKENS = 1100
NUM_BLOCKS = 100
BLOCK_SIZE = 64


def random_step(rng: random.Random) -> list[SequenceSlice]:
    """Single tokens and chunks, whole prompts and continued ones."""
    slices: list[SequenceSlice] = []
    left = MAX_NUM_TOKENS
    for index in range(rng.randint(1, MAX_NUM_SEQS)):
        count = 1 if rng.random() < 0.7 else rng.randint(1, 600)
        if count > left:
            break
        left -= count
        first = rng.randint(0, 3000) if rng.random() < 0.7 else 0
        num_blocks = -(-(first + count) // BLOCK_SIZE)
        slices.append(
            SequenceSlice(
                request_id=RequestId(f"r{index}"),
                first_position=first,
                token_ids=(1,) * count,
                has_pending_token=count == 1 and rng.random() < 0.3,
                block_table=tuple(BlockId(rng.randrange(NUM_BLOCKS)) for _ in range(num_blocks)),
                samples=rng.random() < 0.8,
            )
        )
    return slices


def decode_step(count: int) -> list[SequenceSlice]:
    block = (BlockId(0),)
    return [SequenceSlice(RequestId(f"r{i}"), 1, (0,), False, block, True) for i in range(count)]


class PretendedGpu(InterpretedDevice):
    """Launches as on a GPU; what is launched is compiled and does not run."""

    is_gpu = True


def main() -> None:
    config = EngineConfig(
        model_path=Path(sys.argv[1]),
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_TOKENS,
    )
    names: list[str] = []
    with recording_compilations(names), torch.inference_mode():
        builder = RankBuilder(config, SingleCommunicator(), PretendedGpu())
        model = builder.load()
        rank = builder.rank(model, builder.pool(model, NUM_BLOCKS), NUM_BLOCKS)
        builder.warm_up(rank, None, model.model_config.vocab_size, NUM_BLOCKS * BLOCK_SIZE)
        rank.prepare_steps(
            builder.decode_buckets,
            builder.chunk_buckets,
            is_graphed=False,
            on_progress=lambda done, total: None,
        )
        # What capturing graphs compiles.
        for bucket in builder.decode_buckets:
            rank.run(decode_step(bucket))
        for bucket in builder.chunk_buckets:
            rank.run([warm_up_slice(bucket, BLOCK_SIZE)])
        num_of_start = len(names)
        rng = random.Random(0)
        for _ in range(NUM_STEPS):
            slices = random_step(rng)
            if slices:
                rank.run(slices)
    print(num_of_start)
    print("\n".join(names[num_of_start:]))


if __name__ == "__main__":
    main()
