import random

import pytest

from baton.core.errors import InternalError
from kvtransfer.tiers.slot_index import SlotIndex


def fill(index, hashes):
    for block_hash in hashes:
        assert index.reserve(block_hash) is not None
        index.commit(block_hash)


def test_coldest_block_makes_room(h):
    index = SlotIndex(2)
    fill(index, [h(1), h(2)])
    index.touch([h(1)])
    assert index.reserve(h(3)).evicted == h(2)
    assert h(2) not in index
    assert h(3) not in index, "not found before it is written"
    index.commit(h(3))
    assert index.coldest(5) == [h(1), h(3)]


def test_pinned_slot_is_not_given_away(h):
    index = SlotIndex(2)
    fill(index, [h(1), h(2)])
    slot = index.pin(h(1))
    assert index.reserve(h(3)).evicted == h(2)
    assert index.reserve(h(4)) is None, "one slot is pinned, the other being written"
    index.unpin(slot)
    assert index.reserve(h(4)).evicted == h(1)


def test_block_on_its_way_is_not_written_twice(h):
    index = SlotIndex(4)
    index.reserve(h(1))
    assert index.reserve(h(1)) is None
    index.commit(h(1))
    assert index.reserve(h(1)) is None


def test_slot_of_a_dropped_block_is_free_with_the_last_pin(h):
    index = SlotIndex(1)
    fill(index, [h(1)])
    slot = index.pin(h(1))
    index.pin(h(1))
    index.drop(h(1))
    assert h(1) not in index
    index.unpin(slot)
    assert index.reserve(h(2)) is None
    index.unpin(slot)
    assert index.reserve(h(2)).slot == slot


def test_adopted_blocks_leave_gaps_free(h):
    index = SlotIndex(6)
    index.adopt([(h(1), 3), (h(2), 0)])
    index.check_integrity()
    assert index.num_free == 4
    slots = {index.reserve(h(n)).slot for n in range(10, 14)}
    assert slots == {1, 2, 4, 5}
    for n in range(10, 14):
        index.abort(h(n))
    index.check_integrity()


def test_no_slots_is_a_defect():
    with pytest.raises(InternalError):
        SlotIndex(0)


@pytest.mark.parametrize("seed", range(4))
def test_random_walk_keeps_every_law(seed, h):
    rng = random.Random(seed)
    num_slots = rng.choice([1, 2, 5, 9])
    index = SlotIndex(num_slots)
    held: list[bytes] = []
    writing: set[bytes] = set()
    slots: dict[bytes, int] = {}
    pins: list[tuple[bytes, int]] = []
    for _ in range(4000):
        block = h(rng.randrange(2 * num_slots + 2))
        action = rng.choice(["reserve", "reserve", "end", "pin", "unpin", "drop", "touch"])
        if action == "reserve":
            reserved = index.reserve(block)
            if reserved is not None:
                assert block not in held
                assert reserved.slot not in {slot for _, slot in pins}
                if reserved.evicted is not None:
                    pinned = {slot for _, slot in pins}
                    assert reserved.evicted == next(b for b in held if slots[b] not in pinned)
                    held.remove(reserved.evicted)
                writing.add(block)
                slots[block] = reserved.slot
        elif action == "end" and writing:
            block = rng.choice(sorted(writing))
            writing.discard(block)
            if rng.random() < 0.8:
                index.commit(block)
                held.append(block)
            else:
                index.abort(block)
        elif action == "pin":
            slot = index.pin(block)
            assert (slot is not None) == (block in held)
            if slot is not None:
                pins.append((block, slot))
        elif action == "unpin" and pins:
            index.unpin(pins.pop(rng.randrange(len(pins)))[1])
        elif action == "drop":
            assert (index.drop(block) is not None) == (block in held)
            held = [b for b in held if b != block]
        elif action == "touch":
            index.touch([block])
            if block in held:
                held.remove(block)
                held.append(block)
        index.check_integrity()
        assert index.coldest(100) == held
    for _, slot in pins:
        index.unpin(slot)
    for block in writing:
        index.abort(block)
    index.check_integrity()
    assert index.is_quiet
    assert index.num_free == num_slots - len(held)
