"""The vectors of the scoring against one worker and one pair at a time, and the laws of costs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core.fabric import LinkReport
from baton.core.worker_info import Epoch, Role, WorkerId
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import PlacementKind, PlacementRequest
from services.router.placement.policy_config import PolicyConfig
from tests.support.cost_reference import Reference
from tests.support.worker_tables import MODEL, Cluster, cluster_of, load_report

TOLERANCE = 1e-9


@st.composite
def clusters(draw):
    """A cluster with loads, links and learned speeds, and what it caches of a prompt."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    config = PolicyConfig(
        local_prefill_max_tokens=rng.choice((0, 64, 512, 100_000)),
        local_prefill_max_queued_tokens=rng.choice((0, 256, 10_000)),
        slowdown_weight=rng.choice((0.0, 0.5, 1.0)),
        work_weight=rng.choice((0.0, 0.7)),
        overlap_half_s=rng.choice((0.0, 0.05, 30.0)),
        affinity_s=0.0,
        min_offer_blocks=rng.choice((1, 2, 5)),
        handoff_tail_tokens=rng.choice((16, 512)),
        link_bytes_per_second=rng.choice((1e5, 1e7, 1e9)),
        host_tier_bytes_per_second=rng.choice((1e6, 1e9)),
    )
    cluster = Cluster(config, _learned(rng))
    most = rng.choice((4, 4, 4, 12))
    names = [f"p{i}" for i in range(rng.randrange(1, most + 1))]
    names += [f"d{i}" for i in range(rng.randrange(1, most + 1))]
    if len(names) % 7 == 0:
        # Leases below would be equal.
        names.append("d99")
    for number, name in enumerate(names):
        free = rng.choice((0, 30, 10_000))
        cluster.add(
            name,
            {"host": rng.choice("ab"), "max_seqs": rng.choice((4, 256))},
            queued_prefill_tokens=rng.choice((0, 100, 5000)),
            num_running=rng.randrange(12),
            resident_kv_tokens=rng.randrange(20_000),
            free_blocks=free,
            leases=(7 * number + 3) % len(names),
            # Some only to be read from; never all of a pool.
            is_draining=rng.random() < 0.15 and name[1] != "0",
        )
    _measure_links(cluster, names, rng)
    num_prompt = rng.choice((1, 15, 16, 17, 160, 1000, 4096))
    lengths = {}
    for name in names:
        if rng.random() < 0.7:
            held = sorted(rng.randrange(num_prompt // 16 + 1) for _ in range(3))
            lengths[name] = tuple(held) if rng.random() < 0.4 else (held[2],) * 3
    return cluster, num_prompt, rng.choice((2, 100, 1000)), lengths


def _learned(rng):
    perf = PerfModel()
    for _ in range(rng.choice((0, 12))):
        role = rng.choice((Role.PREFILL, Role.DECODE))
        worker_id = WorkerId(f"{role.value[0]}{rng.randrange(4)}")
        perf.observe_prefill(role, worker_id, rng.randrange(1, 9999), 0, rng.uniform(0.01, 2))
        perf.observe_queue(role, worker_id, 3000, rng.uniform(0.01, 1))
        perf.observe_itl(role, worker_id, rng.randrange(1, 50), 9000, rng.uniform(0.005, 0.1))
    return perf


def _measure_links(cluster, names, rng):
    for reader in names:
        for peer in names:
            if reader != peer and rng.random() < 0.4:
                link = LinkReport(
                    WorkerId(peer), Epoch("1"), "fake", "", rng.choice((1e5, 1e8, 1e11)), 0.002
                )
                rows = [cluster.table.get(WorkerId(name)) for name in (reader, peer)]
                cluster.table.topology.report(rows[0].index, rows[1].index, link)


@settings(max_examples=250, deadline=None)
@given(clusters())
def test_vectors_equal_the_formulas_worker_by_worker(drawn):
    cluster, num_prompt, max_tokens, lengths = drawn
    placement = cluster.place(num_prompt, max_tokens, cached=lengths)
    reference = Reference(
        list(cluster.table.rows()),
        cluster.match(lengths),
        PlacementRequest(MODEL, num_prompt, max_tokens),
        cluster.config,
        cluster.perf,
        cluster.table.topology,
    )
    assert placement.score == pytest.approx(reference.best(), rel=TOLERANCE, abs=1e-4)
    rows = {row.info.worker_id: row for row in cluster.table.rows()}
    for terms in placement.terms:
        cost = reference.cost(rows[terms.worker_id])
        assert terms.prefill_cost == pytest.approx(cost.prefill, rel=TOLERANCE)
        assert terms.queue_s == pytest.approx(cost.queue_s, rel=TOLERANCE)
        assert terms.move_s + terms.compute_s == pytest.approx(
            cost.move_s + cost.compute_s, rel=TOLERANCE
        )
        if terms.role is Role.DECODE:
            assert terms.decode_cost == pytest.approx(cost.decode, rel=TOLERANCE)
            assert terms.itl_s == pytest.approx(cost.itl_s, rel=TOLERANCE)
            assert terms.missing_kv == int(cost.missing)
    computes = reference.cost(rows[placement.computes_prompt])
    assert placement.predicted.ttft_s == pytest.approx(
        computes.queue_s + computes.move_s + computes.compute_s + cluster.perf.overhead_s
    )
    if placement.kind is PlacementKind.REMOTE_PREFILL:
        pair = rows[placement.prefill], rows[placement.decode]
        assert placement.handoff_s == pytest.approx(reference.handoff(*pair), rel=TOLERANCE)


def _score(cluster, num_prompt=3000, **kw):
    return cluster.place(num_prompt, **kw).score


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 186),
    st.integers(0, 186),
    st.sampled_from(("p0", "p1", "d0", "d1")),
    st.sampled_from((1e4, 1e6, 1e9)),
)
def test_more_cached_is_never_worse(blocks, more, name, bytes_per_second):
    cluster = cluster_of("p0", "p1", "d0", "d1", link_bytes_per_second=bytes_per_second)
    cluster.books["p1"].sent("x", prefill_tokens=2000, kv_tokens=0, now_s=0.0)
    other = {"p1": 40, "d1": 20, "p0": 3, "d0": 0}
    fewer, longer = sorted((blocks, more))
    worse = _score(cluster, cached={**other, name: max(fewer, other[name])})
    better = _score(cluster, cached={**other, name: max(longer, other[name])})
    assert better <= worse + 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20_000),
    st.integers(0, 20_000),
    st.sampled_from(("queued_prefill_tokens", "num_running", "resident_kv_tokens")),
    st.sampled_from(("p0", "d0")),
)
def test_more_load_is_never_better(one, other, what, name):
    def score(value):
        cluster = cluster_of("p0", "p1", "d0", "d1")
        for busy in ("p1", "d1"):
            cluster.books[busy].sent("x", prefill_tokens=3000, kv_tokens=3000, now_s=0.0)
        cluster.books[name].report(load_report(**{what: value}), 1.0)
        return _score(cluster, cached={"p0": 100})

    less, more = sorted((one, other))
    assert score(less) <= score(more) + 1e-5


def test_better_tiers_are_worth_more():
    def cost(first_tier):
        lengths = tuple(150 if tier >= first_tier else 0 for tier in range(3))
        placement = cluster_of("p0", "d0").place(3000, cached={"p0": lengths})
        return placement.terms_of("p0").prefill_cost

    assert cost(0) < cost(1) < cost(2) < cost(3)


def test_slow_tier_is_left_alone():
    """Restoring that takes longer than computing costs nothing: it is not done."""
    slow = cluster_of("p0", "d0", disk_tier_bytes_per_second=1e3)
    assert _score(slow, cached={"p0": (0, 0, 150)}) == pytest.approx(_score(slow), abs=1e-5)


def test_attention_makes_long_contexts_dearer_than_their_tokens():
    def compute_s(num_prompt, cached=0):
        terms = cluster_of("p0", "d0").place(num_prompt, cached={"p0": cached}).terms_of("p0")
        return terms.compute_s

    assert compute_s(64_000) > 2 * compute_s(32_000)
    assert compute_s(33_000, cached=2000) > compute_s(1000)


def test_room_for_one_more_sequence_is_worth_waiting_costs():
    cluster = Cluster(PolicyConfig())
    cluster.add("p0")
    cluster.add("d0", {"max_seqs": 8}, num_running=8)
    cluster.add("d1", {"max_seqs": 64}, num_running=9)
    assert cluster.place().decode == "d1"
