from __future__ import annotations

import dataclasses
import random

import pytest

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import LoadReport, Role, WorkerInfo
from services.router.cluster_view import ClusterView, WorkerState
from services.router.prefix_source import offer

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")
OTHER = dataclasses.replace(LAYOUT, model_id="n")


def worker(name, *, layout=LAYOUT, lost=False, **load):
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    info = WorkerInfo(name, "1", role, f"h:{name}", "m", layout, 1000, 8192, 32, "fake", 1)
    return WorkerState(info, LoadReport(**load), is_quarantined=lost)


def find(workers, cached, *, reader="p0", num_prompt_tokens=1000, min_offer_blocks=2):
    return offer(
        ClusterView(tuple(workers)),
        reader,
        cached,
        num_prompt_tokens=num_prompt_tokens,
        min_offer_blocks=min_offer_blocks,
    )


def test_worker_of_either_pool_that_caches_most_is_offered():
    workers = [worker("p0"), worker("p1"), worker("d0")]
    assert find(workers, {"d0": 9, "p1": 5}) == ("d0", 9, 0)
    assert find(workers, {"d0": 5, "p1": 9, "p0": 3}) == ("p1", 9, 3)


@pytest.mark.parametrize(("own", "is_offered"), [(7, True), (8, True), (9, False), (12, False)])
def test_difference_must_be_worth_mentioning(own, is_offered):
    found = find([worker("p0"), worker("d0")], {"d0": 10, "p0": own})
    assert (found is not None) == is_offered


def test_block_of_the_last_prompt_token_is_worth_nothing():
    workers = [worker("p0"), worker("d0")]
    assert find(workers, {"d0": 4}, num_prompt_tokens=64, min_offer_blocks=4) is None
    assert find(workers, {"d0": 4}, num_prompt_tokens=65, min_offer_blocks=4) == ("d0", 4, 0)
    assert find(workers, {"d0": 99, "p0": 61}, num_prompt_tokens=1000) is None


@pytest.mark.parametrize("unfit", [{"lost": True}, {"is_unhealthy": True}, {"layout": OTHER}])
def test_workers_that_cannot_be_read_are_not_offered(unfit):
    assert find([worker("p0"), worker("d0", **unfit)], {"d0": 10}) is None


def test_draining_worker_may_still_be_read():
    assert find([worker("p0"), worker("d0", is_draining=True)], {"d0": 10}) is not None


def test_among_equals_the_one_read_least_is_offered():
    workers = [worker("p0"), worker("d0", leases=3), worker("d1", leases=1), worker("d2", leases=2)]
    assert find(workers, {"d0": 8, "d1": 8, "d2": 8}).source == "d1"
    assert find(workers, {"d0": 9, "d1": 8, "d2": 8}).source == "d0"


def test_unknown_reader_or_nothing_cached_is_no_offer():
    assert find([worker("d0")], {"d0": 9}) is None
    assert find([worker("p0"), worker("d0")], {}) is None


def test_swept_laws():
    rng = random.Random(2)
    num_offers = 0
    for _ in range(2000):
        workers = [
            worker(
                f"{rng.choice('pd')}{n}",
                layout=rng.choice((LAYOUT, LAYOUT, OTHER)),
                lost=rng.random() < 0.1,
                leases=rng.randrange(3),
            )
            for n in range(rng.randrange(1, 6))
        ]
        cached = {w.info.worker_id: rng.randrange(12) for w in workers}
        reader = rng.choice(workers)
        found = find(workers, cached, reader=reader.info.worker_id, num_prompt_tokens=160)
        own = min(cached[reader.info.worker_id], 9)
        readable = {
            w.info.worker_id: min(cached[w.info.worker_id], 9)
            for w in workers
            if w is not reader and w.is_readable and w.info.layout == reader.info.layout
        }
        most = max(readable.values(), default=0)
        if most - own < 2:
            assert found is None
            continue
        num_offers += 1
        assert found.num_blocks == most == readable[found.source] and found.num_own_blocks == own
    assert num_offers > 300
