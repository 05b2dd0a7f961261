from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.fabric import FabricReport, LinkReport
from baton.core.worker_info import Epoch, WorkerId
from services.router.placement.prefix_source import MAX_SOURCES, offer_for, ways_to_prefix
from services.router.placement.scoring import lengths_in_pool
from tests.services.router.placement.test_worker_table import OTHER
from tests.support.worker_tables import LAYOUT, cluster_of


def ways_of(cluster, cached, num_tokens=1000, held=None):
    pool = next(p for p in cluster.table.pools("m") if p.layout == LAYOUT)
    lengths = lengths_in_pool(cluster.match(cached), pool)
    known = lengths if held is None else lengths_in_pool(cluster.match(held), pool)
    return pool, ways_to_prefix(pool, lengths, known, num_tokens, cluster.config)


def blocks(ways, pool, name):
    return [way.blocks[pool.position[WorkerId(name)]] for way in ways.ways]


def moves_s(ways, pool, name):
    position = pool.position[WorkerId(name)]
    return [0.0 if way.move_s is None else way.move_s[position] for way in ways.ways]


def test_nothing_cached_is_no_way():
    assert ways_of(cluster_of("p0", "d0"), {})[1] is None


def test_own_blocks_and_those_of_either_pool_are_ways():
    pool, ways = ways_of(cluster_of("p0", "p1", "d0"), {"d0": 9, "p0": 5})
    assert ways.first_fetch == 1
    assert blocks(ways, pool, "p0") == [5, 9, 5]
    assert blocks(ways, pool, "p1") == [0, 9, 5]
    assert blocks(ways, pool, "d0") == [9, 9, 9]
    assert ways.ways[0].move_s is None and all((way.move_s > 0).all() for way in ways.ways[1:])


def test_tiers_are_ways_at_the_price_of_a_restore():
    cluster = cluster_of("p0", "d0", host_tier_bytes_per_second=1e8, disk_tier_bytes_per_second=1e6)
    pool, ways = ways_of(cluster, {"p0": (3, 7, 9)})
    assert ways.first_fetch == 3
    assert blocks(ways, pool, "p0")[:3] == [3, 7, 9]
    host_s = 0.002 + 4 * LAYOUT.block_bytes / 1e8
    disk_s = host_s + 0.002 + 2 * LAYOUT.block_bytes / 1e6
    assert moves_s(ways, pool, "p0")[:3] == pytest.approx([0.0, host_s, disk_s])
    # A peer can lease what is in a pool only.
    assert blocks(ways, pool, "d0") == [0, 0, 0, 3]


@pytest.mark.parametrize(("own", "is_named"), [(7, True), (8, True), (9, False), (12, False)])
def test_hint_that_does_not_pay_here_must_be_worth_mentioning(own, is_named):
    pool, ways = ways_of(cluster_of("p0", "d0"), {"d0": 10, "p0": own})
    assert (offer_for(ways, pool, 0, 0, 2) is not None) == is_named
    # What the score counts on is always named.
    assert (offer_for(ways, pool, 0, 1, 2) is not None) == (own < 10)


def test_block_of_the_last_prompt_token_is_worth_nothing():
    cluster = cluster_of("p0", "d0")
    for num_tokens, usable in ((64, 3), (65, 4), (63, 3)):
        pool, ways = ways_of(cluster, {"d0": num_tokens // 16}, num_tokens)
        assert max(blocks(ways, pool, "p0")) == usable and 16 * usable < num_tokens
        assert offer_for(ways, pool, 0, 1, 2) == ("d0", usable, 0)


@pytest.mark.parametrize("unfit", ["lost", "unhealthy", "layout"])
def test_workers_that_cannot_be_read_are_no_source(unfit):
    cluster = cluster_of("p0")
    cluster.add(
        "d0", {"layout": OTHER} if unfit == "layout" else None, is_unhealthy=unfit == "unhealthy"
    )
    if unfit == "lost":
        cluster.table.set_lost(WorkerId("d0"))
    assert ways_of(cluster, {"d0": 10})[1] is None


def test_what_a_worker_was_only_sent_cannot_be_read():
    pool, ways = ways_of(cluster_of("p0", "p1", "d0"), {"p0": 10}, held={})
    assert blocks(ways, pool, "p0") == [10] and blocks(ways, pool, "p1") == [0]
    assert offer_for(ways, pool, 1, 0, 2) is None


def test_among_equals_the_one_read_least_comes_first():
    cluster = cluster_of("p0")
    for name, leases in (("d0", 3), ("d1", 1), ("d2", 2)):
        cluster.add(name, leases=leases)
    pool, ways = ways_of(cluster, {"d0": 8, "d1": 8, "d2": 8})
    assert [pool.worker_id(s) for s in ways.sources] == ["d1", "d2", "d0"]
    pool, ways = ways_of(cluster, {"d0": 9, "d1": 8, "d2": 8})
    assert pool.worker_id(ways.sources[0]) == "d0"


def test_sources_are_few_and_the_longest():
    names = [f"p{i}" for i in range(12)]
    _, ways = ways_of(cluster_of(*names), {name: 5 + i for i, name in enumerate(names)})
    assert ways.source_blocks == [16, 15, 14, 13] and len(ways.sources) == MAX_SOURCES


def test_peer_that_has_more_than_nobody_is_no_source():
    names = [f"p{i}" for i in range(6)]
    _, ways = ways_of(cluster_of(*names), {name: 9 if name == "p3" else 4 for name in names})
    assert ways.source_blocks == [9]
    _, ways = ways_of(cluster_of(*names), dict.fromkeys(names, 4))
    assert ways.sources == []


def test_bytes_go_at_the_rate_of_the_readers_own_link():
    cluster = cluster_of("p0", "p1", "d0")
    link = LinkReport(WorkerId("d0"), Epoch("1"), "fake", "", 1e6, 0.5)
    cluster.table.report_links(WorkerId("p1"), FabricReport((link,)))
    _, ways = ways_of(cluster, {"d0": 10})
    assert ways.ways[1].move_s[:2].tolist() == pytest.approx(
        [0.003 + 10 * LAYOUT.block_bytes / 1e9, 0.502 + 10 * LAYOUT.block_bytes / 1e6]
    )


def test_swept_laws():
    """An offer names a readable other worker with the most blocks, or the one the way reads."""
    rng, num_offers = random.Random(2), 0
    for _ in range(600):
        names = [f"{rng.choice('pd')}{n}" for n in range(rng.randrange(1, 6))]
        cluster = cluster_of(*names)
        for name in names[1:]:
            if rng.random() < 0.1:
                cluster.table.set_lost(WorkerId(name))
        cached = {name: rng.randrange(11) for name in names}
        pool, ways = ways_of(cluster, cached, 160)
        if ways is None:
            continue
        reached = np.array([way.blocks for way in ways.ways])
        assert (reached < 10).all() and (np.diff(reached[: ways.first_fetch], axis=0) >= 0).all()
        position = rng.randrange(pool.num_candidates)
        way = rng.randrange(len(ways.ways))
        own = min(cached[pool.worker_id(position)], 9)
        found = offer_for(ways, pool, position, way, 2)
        if found is None:
            continue
        num_offers += 1
        assert found.source != pool.worker_id(position) and found.num_own_blocks == own
        least = own + (1 if way >= ways.first_fetch else 2)
        assert found.num_blocks == min(cached[found.source], 9) >= least
        if way < ways.first_fetch:
            others = [min(cached[pool.worker_id(i)], 9) for i in range(pool.num_candidates)]
            assert found.num_blocks == max(others)
        else:
            assert found.num_blocks == reached[way, position]
    assert num_offers > 100
