"""Runs of consecutive ids and id checks."""

from __future__ import annotations

import itertools
import random

import pytest

from baton.core.block import BlockId
from baton.core.errors import TransferError
from kvtransfer.plan import Run, checked_ids, merge_runs


def test_runs_are_consecutive_on_both_sides():
    remote = checked_ids([4, 5, 6, 9], 10, "a")
    local = checked_ids([0, 1, 2, 7], 10, "b")
    assert merge_runs(remote, local) == [Run(4, 0, 3), Run(9, 7, 1)]
    assert merge_runs(remote[:0], local[:0]) == []
    assert len(merge_runs(remote, checked_ids([3, 2, 1, 0], 10, "b"))) == 4


@pytest.mark.parametrize("seed", range(20))
def test_runs_cover_every_pair_once_and_are_maximal(seed):
    rng = random.Random(seed)
    pairs, r, q = [], 0, 500
    for _ in range(rng.randrange(1, 60)):
        r, q = r + rng.choice([1, 1, 2]), q + rng.choice([1, 1, 3])
        pairs.append((r, q))
    remote = checked_ids([BlockId(a) for a, _ in pairs], 1000, "a")
    local = checked_ids([BlockId(b) for _, b in pairs], 1000, "b")
    runs = merge_runs(remote, local)
    assert [(x.remote + i, x.local + i) for x in runs for i in range(x.num_blocks)] == pairs
    for a, b in itertools.pairwise(runs):
        assert (a.remote + a.num_blocks, a.local + a.num_blocks) != (b.remote, b.local)


@pytest.mark.parametrize("bad", [-1, 8, 2**31, 2**40])
def test_ids_outside_the_pool_are_refused(bad):
    with pytest.raises(TransferError, match=f"block id {bad} is outside p's pool of 8 blocks"):
        checked_ids([BlockId(0), BlockId(bad)], 8, "p's")
