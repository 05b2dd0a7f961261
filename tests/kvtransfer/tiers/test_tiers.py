"""The two tiers as one: what is said to be held comes back byte for byte, or not at all."""

import os
import random
import threading

import pytest

from baton.core.errors import TransferError
from baton.core.fabric import TierName
from kvtransfer.tiers.host_tier import HostTier
from kvtransfer.tiers.tiers import Tiers


@pytest.fixture
def pool(make_pool):
    return make_pool(64)


def make_tiers(folder, layout, *, num_host=8, piece_blocks=4, is_checked=False, **disk):
    host = HostTier(num_host * layout.block_bytes, layout.block_bytes, is_checked=is_checked)
    return Tiers(host, folder.open(**disk), max_piece_bytes=piece_blocks * layout.block_bytes)


def save(tiers, pool, hashes):
    """In the order given; how many found room."""
    for block_id, block_hash in enumerate(hashes):
        pool.fill(block_id, block_hash)
    blocks = [(block_hash, block_id) for block_id, block_hash in enumerate(hashes)]
    return len(tiers.save(blocks, pool.copier))


def load(tiers, pool, hashes):
    """Length of what came back; all of it is verified, and the rest is untouched."""
    block_ids = random.Random(len(hashes)).sample(range(pool.num_blocks), len(hashes))
    pool.blocks[:] = 7
    num_loaded = tiers.load(hashes, block_ids, pool.deliver)
    for block_hash, block_id in list(zip(hashes, block_ids, strict=True))[:num_loaded]:
        assert pool.holds(block_id, block_hash)
    for block_id in set(range(pool.num_blocks)) - set(block_ids[:num_loaded]):
        assert (pool.blocks[block_id] == 7).all()
    return num_loaded


def write_all_cold(tiers):
    while tiers.write_back():
        pass


def test_saved_chain_is_restored_from_its_start(folder, layout, pool, h):
    tiers = make_tiers(folder, layout)
    chain = [h(n) for n in range(6)]
    assert save(tiers, pool, list(reversed(chain))) == 6
    assert tiers.num_restorable([*chain, h(99)]) == 6
    assert tiers.num_restorable([h(99), *chain]) == 0
    assert load(tiers, pool, chain) == 6
    assert load(tiers, pool, [*chain[:3], h(99), *chain[3:]]) == 3
    tiers.close()


def test_block_saved_again_is_not_copied(folder, layout, pool, h):
    tiers = make_tiers(folder, layout)
    save(tiers, pool, [h(1)])
    pool.blocks[0] = 9
    assert tiers.save([(h(1), 0)], pool.copier) == [0]
    assert load(tiers, pool, [h(1)]) == 1
    tiers.close()


def test_cold_blocks_go_to_disk_before_they_make_room(folder, layout, pool, h):
    tiers = make_tiers(folder, layout, num_host=8, num_slots=16)
    numbers = iter(range(20))
    for n in numbers:
        save(tiers, pool, [h(n)])
        write_all_cold(tiers)
    assert len(tiers.host) == 8
    assert all(h(n) in tiers for n in range(4, 20)), "no block was lost between the tiers"
    assert tiers.write_back() == 0, "the warm part stays in memory alone"
    assert tiers.retry_in_s is None
    host, disk = tiers.reports()
    assert (host.tier, disk.tier) == (TierName.HOST, TierName.DISK)
    assert disk.num_blocks < 16
    tiers.check_integrity()
    tiers.close()


def test_hit_on_disk_is_promoted(folder, layout, pool, h):
    tiers = make_tiers(folder, layout, num_host=4)
    for n in range(10):
        save(tiers, pool, [h(n)])
        write_all_cold(tiers)
    assert h(3) not in tiers.host
    assert load(tiers, pool, [h(3)]) == 1
    assert h(3) in tiers.host
    tiers.close()


def test_chain_longer_than_the_host_tier_comes_from_disk(folder, layout, pool, h):
    tiers = make_tiers(folder, layout, num_host=2, num_slots=32)
    for n in range(20):
        save(tiers, pool, [h(n)])
        write_all_cold(tiers)
    tiers.flush(folder.clock, 1.0)
    assert load(tiers, pool, [h(n) for n in range(20)]) == 20
    assert tiers.is_quiet
    tiers.check_integrity()
    tiers.close()


def test_later_blocks_of_a_restored_chain_leave_first(folder, layout, pool, h):
    tiers = make_tiers(folder, layout, num_host=4)
    chain = [h(n) for n in range(4)]
    save(tiers, pool, chain)
    load(tiers, pool, chain)
    save(tiers, pool, [h(10), h(11)])
    assert tiers.num_restorable(chain) == 2
    tiers.close()


def test_corrupt_block_ends_the_run(folder, layout, pool, h):
    tiers = make_tiers(folder, layout)
    chain = [h(n) for n in range(8)]
    save(tiers, pool, chain)
    assert tiers.flush(folder.clock, 1.0) == 8
    tiers.close()
    slab = folder.slabs[0]
    data = bytearray(slab.read_bytes())
    # Flushed from the warm end: block 7 lies first, block 5 third.
    data[-32768 * 2 + 5] ^= 1
    slab.write_bytes(data)
    tiers = make_tiers(folder, layout)
    assert tiers.num_restorable(chain) == 8
    assert load(tiers, pool, chain) == 5
    assert tiers.num_corrupt == 1
    assert tiers.num_restorable(chain) == 5
    assert load(tiers, pool, chain[6:]) == 2
    assert tiers.is_quiet
    tiers.check_integrity()
    tiers.close()


def test_copier_that_fails_leaves_nothing_behind(folder, layout, pool, h):
    tiers = make_tiers(folder, layout)
    with pytest.raises(TransferError):
        tiers.save([(h(1), 0), (h(2), 10_000)], pool.copier)
    assert h(1) not in tiers and h(2) not in tiers
    save(tiers, pool, [h(1)])
    with pytest.raises(TransferError):
        tiers.load([h(1)], [10_000], pool.deliver)
    assert load(tiers, pool, [h(1)]) == 1
    assert tiers.is_quiet
    tiers.check_integrity()
    tiers.close()


def test_load_ends_when_no_more_is_wanted(folder, layout, pool, h):
    tiers = make_tiers(folder, layout, piece_blocks=2)
    chain = [h(n) for n in range(6)]
    save(tiers, pool, chain)
    pieces = []

    def deliver(slots, block_ids):
        pieces.append(list(block_ids))
        return len(pieces) < 2

    assert tiers.load(chain, list(range(6)), deliver) == 2
    assert pieces == [[0, 1], [2, 3]]
    assert tiers.is_quiet
    tiers.close()


def test_disk_out_of_order_is_tried_again_only_when_there_is_work(folder, layout, pool, h):
    folder.path.write_text("in the way")
    tiers = make_tiers(folder, layout, num_host=4, is_opened=False)
    save(tiers, pool, [h(n) for n in range(4)])
    assert tiers.write_back() == 0
    assert tiers.retry_in_s == 10.0
    assert load(tiers, pool, [h(n) for n in range(4)]) == 4, "the host tier goes on"
    folder.path.unlink()
    folder.clock.advance(10.0)
    assert tiers.retry_in_s == 0.0
    assert tiers.write_back() > 0
    write_all_cold(tiers)
    assert tiers.retry_in_s is None
    tiers.close()


def test_flush_ends_at_its_deadline(folder, layout, pool, h):
    tiers = make_tiers(folder, layout)
    save(tiers, pool, [h(n) for n in range(8)])
    clock = folder.clock
    clock.now = lambda: clock.advance(1.0) or type(clock).now(clock)
    assert 0 < tiers.flush(clock, 4.0) < 8
    tiers.close()


@pytest.mark.parametrize("seed", range(3))
def test_random_walk_never_gives_a_wrong_byte(folder, layout, pool, h, seed):
    """Against a model that knows only what was ever saved; with restarts and damage."""
    rng = random.Random(seed)
    num_open = len(os.listdir("/proc/self/fd"))
    shape = {"num_host": rng.choice([1, 3, 6]), "num_slots": rng.choice([2, 9]), "is_checked": True}
    tiers = make_tiers(folder, layout, **shape)
    saved = set()
    num_loaded = 0
    for _ in range(4000):
        action = rng.choices(["save", "load", "write", "close", "damage"], [6, 6, 8, 0.3, 0.3])[0]
        chain = [h(n) for n in rng.sample(range(16), rng.randrange(1, 6))]
        if action == "save":
            save(tiers, pool, chain)
            saved |= set(chain)
        elif action == "load":
            num_held = tiers.num_restorable(chain)
            assert all(block_hash in saved for block_hash in chain[:num_held])
            num_corrupt = tiers.num_corrupt
            count = load(tiers, pool, chain)
            num_loaded += count
            if tiers.num_corrupt == num_corrupt and len(chain) < shape["num_host"]:
                assert count >= num_held, "what is held is delivered"
        elif action == "write":
            tiers.write_back()
        elif action == "close":
            if rng.random() < 0.7:
                tiers.flush(folder.clock, 1.0)
            held = len(tiers.disk)
            tiers.close()
            shape["num_slots"] = rng.choice([2, 5, 9])
            tiers = make_tiers(folder, layout, **shape)
            assert len(tiers.disk) <= held
        elif action == "damage" and folder.slabs:
            slab = rng.choice(folder.slabs)
            with slab.open("r+b") as file:
                file.seek(rng.randrange(slab.stat().st_size))
                file.write(rng.randbytes(3))
        tiers.check_integrity()
        assert tiers.is_quiet
        host, disk = tiers.reports()
        assert host.num_bytes <= host.max_bytes
        assert folder.num_bytes <= disk.max_bytes
        folder.clock.advance(1.0)
    tiers.close()
    assert num_loaded > 300
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_threads_do_not_disturb_each_other(folder, layout, make_pool, h):
    """One saves, one writes back, one loads, over far more blocks than fit."""
    tiers = make_tiers(folder, layout, num_host=6, num_slots=12, piece_blocks=2)
    done = threading.Event()
    errors = []

    def run(work):
        try:
            while not done.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    saved_from, loaded_into = make_pool(8), make_pool(8)
    choice = random.Random(1)

    def save_some():
        save(tiers, saved_from, [h(n) for n in choice.sample(range(24), 2)])

    threads = [threading.Thread(target=run, args=(w,)) for w in (save_some, tiers.write_back)]
    for thread in threads:
        thread.start()
    rng = random.Random(2)
    num_loaded = 0
    for _ in range(800):
        num_loaded += load(tiers, loaded_into, [h(n) for n in rng.sample(range(24), 4)])
        tiers.num_restorable([h(n) for n in range(24)])
    done.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert num_loaded > 50
    assert tiers.num_corrupt == 0
    assert tiers.is_quiet
    tiers.check_integrity()
    tiers.close()
