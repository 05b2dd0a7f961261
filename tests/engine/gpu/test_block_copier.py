"""Blocks of a GPU's pool to pinned host memory and back."""

from __future__ import annotations

import mmap
import threading

import pytest
import torch

from baton.core.errors import TransferError
from baton.engine.gpu.block_copier import GpuBlockCopier

pytestmark = pytest.mark.gpu

BLOCK_BYTES = 96 * 1024
NUM_BLOCKS = 16


@pytest.fixture
def pool():
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (NUM_BLOCKS, BLOCK_BYTES)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)


@pytest.fixture
def arena():
    return memoryview(mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES, flags=mmap.MAP_PRIVATE))


@pytest.fixture
def copier(pool, arena):
    torch.cuda.synchronize()
    copier = GpuBlockCopier(
        pool.data_ptr(), num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, device_id=0
    )
    copier.register(arena)
    yield copier
    copier.close()


def slots(arena, *numbers):
    return [arena[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES] for n in numbers]


def test_blocks_go_out_and_in(pool, arena, copier):
    before = pool.cpu()
    copier.copy_out([5, 0, 15], slots(arena, 2, 3, 9))
    for block, slot in zip((5, 0, 15), slots(arena, 2, 3, 9), strict=True):
        assert bytes(slot) == before[block].numpy().tobytes()
    copier.copy_in(slots(arena, 9, 2), [1, 2])
    after = pool.cpu()
    assert torch.equal(after[1], before[15])
    assert torch.equal(after[2], before[5])
    rest = [n for n in range(NUM_BLOCKS) if n not in (1, 2)]
    assert torch.equal(after[rest], before[rest])


def test_registered_memory_is_pinned_until_the_copier_is_closed(arena, copier):
    assert torch.frombuffer(arena, dtype=torch.uint8).is_pinned()
    copier.close()
    assert not torch.frombuffer(arena, dtype=torch.uint8).is_pinned()
    copier.close()


def test_block_outside_the_pool_is_refused(pool, arena, copier):
    before = pool.cpu()
    for bad in (-1, NUM_BLOCKS):
        with pytest.raises(TransferError, match=f"block id {bad} is outside our pool"):
            copier.copy_in(slots(arena, 0, 1), [0, bad])
    assert torch.equal(pool.cpu(), before)


def test_two_threads_copy_beside_a_busy_device(pool, arena, copier):
    """Both directions at once while the compute stream is full of work."""
    before = pool.cpu()
    matrix = torch.randn(2048, 2048, device="cuda")
    errors = []

    def run(work):
        try:
            for _ in range(50):
                work()
        except BaseException as error:
            errors.append(error)

    out = threading.Thread(
        target=run, args=(lambda: copier.copy_out([0, 1, 2], slots(arena, 0, 1, 2)),)
    )
    source = slots(arena, 8)[0]
    source[:] = b"\7" * BLOCK_BYTES
    into = threading.Thread(
        target=run, args=(lambda: copier.copy_in(slots(arena, 8, 8), [10, 11]),)
    )
    out.start()
    into.start()
    for _ in range(200):
        matrix = torch.tanh(matrix @ matrix)
    out.join()
    into.join()
    assert not errors, errors[0]
    assert bytes(slots(arena, 1)[0]) == before[1].numpy().tobytes()
    assert (pool[10:12] == 7).all()
    assert torch.isfinite(matrix).all()
