"""What tiers say of the blocks that come and go, for routers to hear of."""

import random
import shutil

import pytest

from baton.core.tier import Tier
from kvtransfer.tiers.host_tier import HostTier
from kvtransfer.tiers.tiers import Tiers


@pytest.fixture
def put_host(h, content):
    def put(tier, number):
        memory = tier.reserve(h(number))
        if memory is not None:
            memory[:] = content(h(number))
            tier.commit(h(number), memory)

    return put


def follow(tiers, known):
    """As a listener does: look up what has changed."""
    while tiers.has_changes:
        for block_hash in tiers.take_changes(3):
            tier = tiers.tier_of(block_hash)
            if tier is None:
                known.pop(block_hash, None)
            else:
                known[block_hash] = tier


def truth(tiers):
    host, disk = tiers.held()
    return dict.fromkeys(disk, Tier.DISK) | dict.fromkeys(host, Tier.HOST)


def test_nobody_watching_costs_no_memory(layout, h, put_host):
    tiers = Tiers(HostTier(4 * layout.block_bytes, layout.block_bytes), None, max_piece_bytes=1)
    put_host(tiers.host, 1)
    assert not tiers.has_changes and tiers.take_changes(10) == []
    tiers.watch()
    put_host(tiers.host, 2)
    assert tiers.take_changes(10) == [h(2)] and not tiers.has_changes


def test_changes_of_both_tiers_lead_to_what_they_hold(folder, layout, h, put, read, put_host):
    rng = random.Random(5)
    host = HostTier(5 * layout.block_bytes, layout.block_bytes, is_checked=True)
    disk = folder.open(num_slots=8)
    tiers = Tiers(host, disk, max_piece_bytes=1)
    tiers.watch()
    known = {}
    for _ in range(600):
        number = rng.randrange(20)
        match rng.randrange(5):
            case 0:
                put_host(host, number)
            case 1:
                host.drop(h(number))
            case 2:
                put(disk, number)
            case 3:
                tiers.write_back()
            case _:
                read(disk, number)
        if rng.random() < 0.3:
            follow(tiers, known)
            assert known == truth(tiers)
    disk.close()
    follow(tiers, known)
    assert known == truth(tiers) and Tier.DISK not in known.values()


def test_blocks_found_in_the_directory_and_lost_with_it_are_told(folder, layout, h, put, read):
    first = folder.open()
    for number in range(6):
        put(first, number)
    first.close()
    disk = folder.open(is_opened=False)
    tiers = Tiers(HostTier(2 * layout.block_bytes, layout.block_bytes), disk, max_piece_bytes=1)
    tiers.watch()
    assert disk.open()
    known = {}
    follow(tiers, known)
    assert known == {h(n): Tier.DISK for n in range(6)}
    folder.slabs[0].unlink()
    assert not read(disk, 0)
    follow(tiers, known)
    assert known == truth(tiers) and 0 < len(known) < 6
    shutil.rmtree(folder.path)
    assert not put(disk, 9) or disk.open()
    follow(tiers, known)
    assert known == truth(tiers) and h(5) not in known
    disk.close()
