"""What made-up workers remember of prompts, and that routers can follow it."""

from __future__ import annotations

import random

from baton.core.block import HASH_BYTES
from bench.router.block_cache import BlockCache
from bench.router.fake_worker import BLOCK_SIZE


def hashes(*names: int) -> bytes:
    return b"".join(name.to_bytes(HASH_BYTES) for name in names)


def test_matches_leading_blocks_and_leaves_the_last_token_to_be_computed():
    cache = BlockCache(10)
    cache.store(hashes(1, 2, 3))
    assert cache.match(hashes(1, 2, 9), 3 * BLOCK_SIZE) == 2 * BLOCK_SIZE
    assert cache.match(hashes(1, 2, 3), 3 * BLOCK_SIZE) == 3 * BLOCK_SIZE - 1
    assert cache.match(hashes(9, 2, 3), 3 * BLOCK_SIZE) == 0


def test_worker_without_a_cache_tells_nothing():
    cache = BlockCache(0)
    cache.store(hashes(1, 2))
    assert cache.match(hashes(1, 2), 100) == 0 and cache.take_events() == (1, [])


def test_events_tell_all_that_is_there():
    rng, cache, known, number = random.Random(1), BlockCache(20), set[bytes](), 0
    for _ in range(500):
        start = rng.randrange(8) * 10
        cache.store(hashes(*range(start, start + rng.randrange(1, 30))))
        if rng.random() < 0.5:
            first, events = cache.take_events()
            assert first == number + 1
            number += len(events)
            for event in events:
                known -= {event.removed[i : i + 16] for i in range(0, len(event.removed), 16)}
                known |= {event.stored[i : i + 16] for i in range(0, len(event.stored), 16)}
            assert known == set(cache._blocks) and len(known) <= 20
