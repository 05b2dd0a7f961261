import mmap

import numpy as np
import pytest

from baton.core.errors import ConfigError
from baton.core.fabric import TierName
from kvtransfer.tiers.host_tier import HostTier


def save(tier, block_hash, content):
    memory = tier.reserve(block_hash)
    if memory is None:
        return False
    memory[:] = content(block_hash)
    tier.commit(block_hash, memory)
    return True


def load(tier, block_hash):
    block = tier.pin(block_hash)
    if block is None:
        return None
    data = bytes(block.memory)
    tier.unpin(block)
    return data


@pytest.fixture
def tier(layout):
    return HostTier(3 * layout.block_bytes + 17, layout.block_bytes)


def test_blocks_come_back_until_they_make_room(tier, h, content):
    for n in range(4):
        assert save(tier, h(n), content)
    assert load(tier, h(0)) is None
    for n in range(1, 4):
        assert load(tier, h(n)) == content(h(n))
    report = tier.report()
    assert (report.tier, report.num_blocks) == (TierName.HOST, 3)
    assert report.num_bytes <= report.max_bytes
    assert tier.is_quiet
    tier.check_integrity()


def test_arena_starts_on_a_page(tier):
    address = np.frombuffer(tier.arena, dtype=np.uint8).ctypes.data
    assert address % mmap.PAGESIZE == 0


def test_pinned_block_is_not_overwritten(tier, h, content):
    for n in range(3):
        save(tier, h(n), content)
    block = tier.pin(h(0))
    for n in range(3, 9):
        save(tier, h(n), content)
    assert bytes(block.memory) == content(h(0))
    tier.unpin(block)


def test_aborted_block_is_not_found(tier, h):
    tier.reserve(h(1))
    tier.abort(h(1))
    assert h(1) not in tier
    assert tier.num_free == tier.num_slots


def test_memory_that_the_machine_has_not_is_refused():
    for num_bytes in (1 << 60, 1 << 70):
        with pytest.raises(ConfigError, match=f"tiers.host_bytes {num_bytes} cannot be had"):
            HostTier(num_bytes, 1 << 20)


def test_changed_memory_is_noticed_when_checked(layout, h, content):
    tier = HostTier(2 * layout.block_bytes, layout.block_bytes, is_checked=True)
    save(tier, h(1), content)
    save(tier, h(2), content)
    tier.arena[5] ^= 1
    assert load(tier, h(1)) is None
    assert h(1) not in tier
    assert tier.num_corrupt == 1
    assert load(tier, h(2)) == content(h(2))
    assert tier.is_quiet
    tier.check_integrity()
