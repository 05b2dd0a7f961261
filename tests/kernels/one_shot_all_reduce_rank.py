"""One rank of a group of real processes, all at the all-reduce at once; a script for tests.

    one_shot_all_reduce_rank.py RANK WORLD_SIZE FOLDER CALLS

With GPUs the ranks map each other's memory through torch; without, they share files in FOLDER and
run the kernel in Triton's interpreter, whose atomics are the processor's own. CALLS is how many
calls this rank makes: one that makes fewer than the others is the one that died.

Exit code 0: every call was right. 3: a rank was missed, named on the last line.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.one_shot_all_reduce import (
    buffer_bytes,
    make_peers,
    one_shot_all_reduce_reference,
)
from kernels.one_shot_group import OneShotAllReduce

MAX_BYTES = 16384
PATIENT_S = 30.0
IMPATIENT_S = 2.0 if torch.cuda.is_available() else 2e-4
"""The interpreter takes far longer for a poll than the microsecond that is counted."""
NUM_PATIENT_CALLS = 16
SIZES = [1, 4096, 63, 8192, 1000, 1024, 1025, 3]


def connect_files(rank: int, world_size: int, folder: Path) -> OneShotAllReduce:
    num_bytes = buffer_bytes(MAX_BYTES, world_size)
    buffers = [
        torch.from_file(str(folder / str(r)), shared=True, size=num_bytes, dtype=torch.uint8)
        for r in range(world_size)
    ]
    addresses = tuple(buffer.data_ptr() for buffer in buffers)
    peers = make_peers(buffers[rank], addresses, rank=rank, max_bytes=MAX_BYTES)
    return OneShotAllReduce(peers, mapping=buffers)


def connect(rank: int, world_size: int, folder: Path) -> tuple[OneShotAllReduce, torch.device]:
    rendezvous = f"file://{folder}/rendezvous"
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        all_reduce = connect_files(rank, world_size, folder)
        dist.barrier()
        return all_reduce, torch.device("cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=world_size)
    all_reduce = OneShotAllReduce.connect(dist.group.WORLD, device=device, max_bytes=MAX_BYTES)
    return all_reduce, device


def contributions(call: int, world_size: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(call)
    size = SIZES[call % len(SIZES)]
    rows = torch.randn(world_size + 1, size, generator=generator).to(device, torch.bfloat16)
    return list(rows.unbind())


def main() -> int:
    rank, world_size, folder, num_calls = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        int(sys.argv[4]),
    )
    all_reduce, device = connect(rank, world_size, folder)
    for call in range(num_calls):
        *parts, residual = contributions(call, world_size, device)
        expected = one_shot_all_reduce_reference(parts, residual=residual)
        all_reduce.deadline_s = PATIENT_S if call < NUM_PATIENT_CALLS else IMPATIENT_S
        out = all_reduce(parts[rank], residual=residual)
        try:
            all_reduce.raise_if_failed()
        except TimeoutError as error:
            print(error)
            return 3
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
