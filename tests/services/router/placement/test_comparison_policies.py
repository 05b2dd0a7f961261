from __future__ import annotations

import random
from collections import Counter

import pytest

from baton.core.errors import ConfigError, NoWorker
from baton.core.worker_info import WorkerId
from services.router.config import load_router_config
from services.router.placement.comparison_policies import make_policy
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import PlacementKind, PlacementRequest
from services.router.placement.policy import CostPolicy, Hits
from services.router.placement.policy_config import PolicyConfig, PolicyName
from tests.support.worker_tables import cluster_of

COMPARED = [name for name in PolicyName if name is not PolicyName.COST]


def choose(policy, cluster, cached=None, num_prompt=1000, max_tokens=100, avoid=frozenset()):
    match = cluster.match(cached or {})
    pools = cluster.table.pools("m")
    request = PlacementRequest("m", num_prompt, max_tokens, avoid)
    return policy.place(cluster.table, pools, [Hits(match, match)] * len(pools), request)


def policy_of(name, seed=1):
    return make_policy(PolicyConfig(name=name), PerfModel(), random.Random(seed))


@pytest.mark.parametrize("name", COMPARED)
def test_every_policy_keeps_the_laws_of_placement(name):
    policy, cluster = policy_of(name), cluster_of("p0", "p1", "d0", "d1")
    placement = choose(policy, cluster, {"p0": 9})
    assert placement.kind is PlacementKind.REMOTE_PREFILL
    assert placement.prefill in ("p0", "p1") and placement.decode in ("d0", "d1")
    assert placement.offer is None and placement.predicted is None
    cached = 144 if placement.prefill == "p0" else 0
    assert placement.terms_of(placement.prefill).uncached == 1000 - cached
    placement = choose(policy, cluster, max_tokens=1)
    assert placement.kind is PlacementKind.PREFILL_ONLY
    assert choose(policy, cluster, avoid=frozenset({"p0", "d1"})).workers == ("p1", "d0")
    for gone in ("d0", "d1"):
        cluster.table.set_lost(WorkerId(gone))
    assert choose(policy, cluster).kind is PlacementKind.PREFILL_ONLY
    with pytest.raises(NoWorker):
        choose(policy, cluster_of())
    assert choose(policy, cluster_of("d0")).kind is PlacementKind.LOCAL_PREFILL


def test_random_takes_all_alike():
    policy, cluster = policy_of(PolicyName.RANDOM), cluster_of("p0", "p1", "p2", "d0")
    counts = Counter(choose(policy, cluster).prefill for _ in range(600))
    assert min(counts.values()) > 150 and len(counts) == 3


def test_round_robin_takes_one_after_another_though_workers_come_and_go():
    policy, cluster = policy_of(PolicyName.ROUND_ROBIN), cluster_of("p2", "p0", "p1", "d0", "d1")
    assert [choose(policy, cluster).workers for _ in range(4)] == [
        ("p0", "d0"), ("p1", "d1"), ("p2", "d0"), ("p0", "d1"),
    ]  # fmt: skip
    cluster.table.set_lost(WorkerId("p1"))
    assert choose(policy, cluster).prefill == "p2"


def test_least_loaded_looks_at_queues_and_batches_only():
    policy, cluster = policy_of(PolicyName.LEAST_LOADED), cluster_of("p0", "d0")
    cluster.add("p1", queued_prefill_tokens=10)
    cluster.add("d1", num_running=1)
    assert choose(policy, cluster, {"p1": 60}).workers == ("p0", "d0")


def test_prefix_only_ignores_queues():
    policy, cluster = policy_of(PolicyName.PREFIX_ONLY), cluster_of("p0", "d0")
    cluster.add("p1", queued_prefill_tokens=100_000)
    assert choose(policy, cluster, {"p1": 60}).prefill == "p1"
    assert choose(policy, cluster, {"p1": 60, "p0": 61}).prefill == "p0"


def test_prefix_only_is_least_loaded_where_less_than_half_is_cached():
    policy, cluster = policy_of(PolicyName.PREFIX_ONLY), cluster_of("p0", "d0")
    cluster.add("p1", queued_prefill_tokens=100_000)
    assert choose(policy, cluster, {"p1": 1}).prefill == "p0"


def test_cost_is_what_a_router_starts_with():
    assert isinstance(policy_of(PolicyConfig().name), CostPolicy)


def test_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="cost, random, round_robin, least_loaded, prefix_only"):
        load_router_config(overrides={"model_path": "/m", "policy": {"name": "best"}})
    overrides = {"model_path": "/m", "policy": {"name": "round_robin"}}
    assert load_router_config(overrides=overrides).policy.name is PolicyName.ROUND_ROBIN
