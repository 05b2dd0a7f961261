import pytest

from baton.core.errors import ConfigError, TransferError
from kvtransfer.tiers.copier import HostCopier
from kvtransfer.transport import PoolRegion


def test_blocks_go_out_and_in(make_pool, layout, h):
    pool = make_pool(4)
    for block_id in range(4):
        pool.fill(block_id, h(block_id))
    slots = [memoryview(bytearray(layout.block_bytes)) for _ in range(2)]
    pool.copier.copy_out([3, 1], slots)
    pool.copier.copy_in(slots, [0, 2])
    assert [pool.holds(0, h(3)), pool.holds(2, h(1)), pool.holds(1, h(1))] == [True] * 3


@pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
def test_block_outside_the_pool_is_refused_before_anything_moves(make_pool, layout, h, bad):
    pool = make_pool(4)
    pool.fill(0, h(0))
    slots = [memoryview(bytearray(b"\1" * layout.block_bytes)) for _ in range(2)]
    with pytest.raises(TransferError, match=f"block id {bad} is outside our pool of 4 blocks"):
        pool.copier.copy_in(slots, [0, bad])
    with pytest.raises(TransferError):
        pool.copier.copy_out([0, bad], slots)
    assert pool.holds(0, h(0))
    assert bytes(slots[0]) == b"\1" * layout.block_bytes


def test_pool_of_a_gpu_is_refused(layout):
    with pytest.raises(ConfigError, match="GPU 1"):
        HostCopier(PoolRegion(1 << 40, layout.block_bytes, 1, layout, device_id=1))
