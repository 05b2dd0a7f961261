"""Which workers a request is placed on."""

from __future__ import annotations

import random
import weakref
from collections import Counter

import pytest

from baton.core.errors import NoWorker
from baton.core.fabric import FabricReport, LinkReport
from baton.core.worker_info import Epoch, Role, WorkerId
from services.router.placement.placement import PlacementKind
from services.router.placement.policy import Noise
from services.router.placement.policy_config import PolicyConfig
from tests.services.router.placement.test_worker_table import OTHER
from tests.support.worker_tables import LAYOUT, Cluster, cluster_of


def cluster(workers, **settings):
    """`workers`: loads by name."""
    made = Cluster(PolicyConfig(**settings))
    for name, load in workers.items():
        info = {key: load.pop(key) for key in ("layout", "model", "max_len", "host") if key in load}
        made.add(name, info, **load)
    return made


def measure(made, reader, source, bytes_per_second):
    link = LinkReport(WorkerId(source), Epoch("1"), "fake", "", bytes_per_second)
    made.table.report_links(WorkerId(reader), FabricReport((link,)))


def test_pair_is_chosen_for_a_long_prompt():
    placement = cluster_of("p0", "d0").place()
    assert placement.kind is PlacementKind.REMOTE_PREFILL
    assert (placement.prefill, placement.decode) == ("p0", "d0")
    assert {t.worker_id for t in placement.terms} == {"p0", "d0"}
    assert placement.num_candidates == 2


def test_queue_drives_away_and_cached_prefix_attracts():
    made = cluster({"p0": {"queued_prefill_tokens": 500}, "p1": {}, "d0": {}}, fetch_s=5.0)
    assert made.place().prefill == "p1"
    assert made.place(cached={"p0": 50}).prefill == "p0"
    assert made.place(cached={"p0": 25}).prefill == "p1"


def test_requests_just_sent_count_before_they_are_reported():
    made = cluster_of("p0", "p1", "d0", "d1")
    made.books["p0"].sent("a", prefill_tokens=600, kv_tokens=0, now_s=0.0)
    made.books["d0"].sent("a", prefill_tokens=0, kv_tokens=600, now_s=0.0)
    assert made.place().workers == ("p1", "d1")


def test_decode_goes_where_kv_and_batch_are_small():
    made = cluster({"p0": {}, "d0": {"resident_kv_tokens": 8000}, "d1": {}})
    assert made.place().decode == "d1"
    made = cluster({"p0": {}, "d0": {"num_running": 10}, "d1": {"num_running": 2}})
    assert made.place().decode == "d1"


def test_worker_without_room_is_avoided_though_its_batch_is_small():
    made = cluster(
        {"p0": {}, "d0": {"free_blocks": 10, "total_blocks": 60}, "d1": {"num_running": 3}}
    )
    assert made.place(3000).decode == "d1"


def test_hot_worker_loses_its_advantage_as_its_queue_grows():
    """One prefix that only p0 has, and peers that cannot be read: work goes elsewhere long before
    the queue costs as much as computing everything anew."""

    def placed(queued, half_s):
        made = cluster(
            {"p0": {"queued_prefill_tokens": queued}, "p1": {}, "d0": {}},
            overlap_half_s=half_s, fetch_s=10.0,
        )  # fmt: skip
        return made.place(16_000, cached={"p0": 950}).prefill

    switches = {
        half_s: next(q for q in range(0, 40_000, 250) if placed(q, half_s) == "p1")
        for half_s in (0.0, 0.3, 30.0)
    }
    assert 0 < switches[0.3] < switches[30.0] <= switches[0.0]


# Peers


def test_prefix_of_a_peer_is_fetched_where_that_is_faster_than_computing_it():
    made = cluster({"p0": {"queued_prefill_tokens": 9000}, "p1": {}, "d0": {}})
    placement = made.place(8000, cached={"p0": 400})
    assert placement.prefill == "p1" and placement.offer == ("p0", 400, 0)
    terms = placement.terms_of(WorkerId("p1"))
    assert terms.cached == 6400 and 0 < terms.move_s < 0.1
    # A prefix worth less than its way: computed, but offered, for the worker knows better.
    slow = cluster({"p0": {"queued_prefill_tokens": 9000}, "p1": {}, "d0": {}}, fetch_s=5.0)
    placement = slow.place(8000, cached={"p0": 400})
    assert placement.terms_of(WorkerId("p1")).cached == 0
    assert placement.offer == ("p0", 400, 0)


def test_reader_with_the_faster_link_computes():
    workers = {"p0": {"queued_prefill_tokens": 90_000}, "p1": {}, "p2": {}, "d0": {}}
    made = cluster(workers, local_prefill_max_tokens=0)
    measure(made, "p1", "p0", 1e6)
    measure(made, "p2", "p0", 1e10)
    for seed in range(5):
        assert made.place(8000, cached={"p0": 499}, seed=seed).prefill == "p2"


def test_nearest_of_equal_sources_is_read():
    made = cluster({"p0": {}, "d0": {}, "d1": {}}, local_prefill_max_tokens=0)
    measure(made, "p0", "d0", 1e7)
    measure(made, "p0", "d1", 1e10)
    assert made.place(8000, cached={"d0": 400, "d1": 400}).offer.source == "d1"


def test_peer_is_read_only_for_what_it_has_said_it_holds():
    made = cluster({"p0": {"queued_prefill_tokens": 90_000}, "p1": {}, "d0": {}})
    placement = made.place(8000, cached={"p0": 400}, held={})
    assert placement.prefill == "p1" and placement.offer is None
    # The worker that was sent it is expected to have it all the same.
    idle = cluster_of("p0", "p1", "d0")
    assert idle.place(8000, cached={"p0": 400}, held={}).prefill == "p0"


def test_worker_that_ends_is_still_read():
    made = cluster({"p0": {"is_draining": True}, "p1": {}, "d0": {}})
    placement = made.place(8000, cached={"p0": 400})
    assert placement.prefill == "p1" and placement.offer.source == "p0"


# Pairs


def test_pair_of_one_host_is_preferred():
    hosts = {"p0": {"host": "a"}, "p1": {"host": "b"}, "d0": {"host": "a"}, "d1": {"host": "b"}}
    made = cluster(hosts, link_bytes_per_second=1e6)
    pairs = {made.place(2000, seed=seed).workers for seed in range(40)}
    assert pairs == {("p0", "d0"), ("p1", "d1")}


def test_both_are_chosen_together():
    """The best prefill worker and the best decode worker have a slow link between them; a pair of
    the second best costs less."""
    made = cluster(
        {"p0": {}, "p1": {"queued_prefill_tokens": 100}, "d0": {}, "d1": {"num_running": 1}}
    )
    assert made.place(4000).workers == ("p0", "d0")
    for reader, source in (("d0", "p0"), ("d1", "p0"), ("d0", "p1")):
        measure(made, reader, source, 1e6)
    assert made.place(4000).workers == ("p1", "d1")


def test_decode_worker_that_has_the_prefix_needs_less_moved():
    made = cluster_of("p0", "d0", "d1", local_prefill_max_tokens=0, link_bytes_per_second=1e6)
    for seed in range(10):
        placement = made.place(4000, cached={"d1": 240, "p0": 240}, seed=seed)
        assert placement.decode == "d1"


def test_only_interchangeable_layouts_are_paired():
    workers = {
        "p0": {"layout": OTHER},
        "p1": {"queued_prefill_tokens": 5000},
        "d0": {},
        "d1": {"layout": OTHER, "resident_kv_tokens": 10_000},
    }
    made = cluster(workers)
    for seed in range(20):
        assert made.place(seed=seed).workers in {("p0", "d1"), ("p1", "d0")}


# Local prefill


def test_few_tokens_on_an_idle_decode_worker_are_computed_there():
    placement = cluster_of("p0", "d0").place(64)
    assert placement.kind is PlacementKind.LOCAL_PREFILL
    assert placement.prefill is None and placement.decode == "d0"
    assert placement.terms_of(WorkerId("d0")).local_cost == pytest.approx(placement.score)


def test_cost_decides_on_local_prefill_within_its_limits():
    """At any load: local exactly where it is allowed and predicted to be cheaper."""
    rng = random.Random(4)
    kinds = Counter()
    for _ in range(400):
        limit = rng.choice((0, 64, 512, 5000))
        queued = rng.choice((0, 200, 300))
        made = cluster(
            {
                "p0": {"queued_prefill_tokens": rng.choice((0, 300, 20_000))},
                "d0": {"num_running": rng.choice((0, 1, 30)), "queued_prefill_tokens": queued},
            },
            local_prefill_max_tokens=limit, link_bytes_per_second=rng.choice((1e6, 1e9)),
        )  # fmt: skip
        num_prompt, cached = rng.choice((10, 100, 600, 4000)), rng.choice((0, 5))
        placement = made.place(num_prompt, cached={"d0": min(cached, num_prompt // 16)})
        terms = {t.worker_id: t for t in placement.terms}
        may = limit >= num_prompt - terms["d0"].cached and queued <= 256 and limit > 0
        assert (terms["d0"].local_cost is not None) == may
        pair = terms["p0"].prefill_cost + terms["d0"].decode_cost
        if placement.kind is PlacementKind.LOCAL_PREFILL:
            assert may and placement.score <= pair + 60
        else:
            assert not may or terms["d0"].local_cost >= placement.score - 1e-5
        kinds[placement.kind] += 1
    assert min(kinds.values()) > 40 and len(kinds) == 2


def test_sequences_that_would_be_held_up_speak_against_local_prefill():
    assert cluster_of("p0", "d0").place(400).kind is PlacementKind.LOCAL_PREFILL
    busy = cluster({"p0": {}, "d0": {"num_running": 8}})
    assert busy.place(400).kind is PlacementKind.REMOTE_PREFILL


def test_long_queue_of_the_prefill_pool_speaks_for_local_prefill():
    workers = {"p0": {"queued_prefill_tokens": 50_000}, "d0": {"num_running": 8}}
    assert cluster(workers).place(400).kind is PlacementKind.LOCAL_PREFILL


# Who is left


def test_one_pool_stands_in_for_the_other():
    placement = cluster_of("d0", "d1").place()
    assert placement.kind is PlacementKind.LOCAL_PREFILL and placement.prefill is None
    made = cluster_of("p0", "d0")
    made.table.set_lost(WorkerId("d0"))
    placement = made.place()
    assert placement.kind is PlacementKind.PREFILL_ONLY and placement.decode is None
    assert placement.prefill == "p0"
    assert placement.predicted.itl_s > 0 and placement.predicted.ttft_s > 0


def test_single_token_stays_on_the_prefill_worker():
    placement = cluster_of("p0", "d0").place(max_tokens=1)
    assert placement.kind is PlacementKind.PREFILL_ONLY
    assert len(list(placement.terms)) == 1 and placement.num_candidates == 2


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({}, "no worker for model"),
        ({"p0": {"model": "x"}}, "no worker for model"),
        ({"d0": {"is_unhealthy": True}}, "1 are unhealthy"),
        ({"d0": {"is_draining": True}}, "1 are draining"),
        ({"d0": {"max_len": 500}}, "longest context served now is 500"),
    ],
)
def test_nobody_is_a_readable_error(workers, message):
    with pytest.raises(NoWorker, match=message):
        cluster(workers).place()


def test_lost_workers_are_named_in_the_error():
    made = cluster_of("d0")
    made.table.set_lost(WorkerId("d0"))
    with pytest.raises(NoWorker, match="1 do not answer"):
        made.place()


def test_avoided_workers_are_the_last_resort():
    made = cluster({"p0": {}, "d0": {}, "d1": {"resident_kv_tokens": 9000}})
    assert made.place(avoid=frozenset({"d0"})).decode == "d1"
    placement = made.place(avoid=frozenset({"d0", "d1"}))
    assert placement.kind is PlacementKind.PREFILL_ONLY
    placement = made.place(avoid=frozenset({"p0", "d0", "d1"}))
    assert placement.kind is PlacementKind.REMOTE_PREFILL


def test_prompts_too_long_for_some_go_to_the_others():
    made = cluster({"p0": {}, "p1": {"max_len": 500}, "d0": {}, "d1": {"max_len": 500}})
    for seed in range(10):
        assert made.place(600, seed=seed).workers == ("p0", "d0")


# Spreading


def test_equal_workers_share_the_work():
    made = cluster_of(*(f"p{i}" for i in range(4)), *(f"d{i}" for i in range(4)))
    noise = Noise(random.Random(3))
    chosen = [made.place(noise=noise) for _ in range(800)]
    for counts in (Counter(p.prefill for p in chosen), Counter(p.decode for p in chosen)):
        assert len(counts) == 4 and min(counts.values()) > 140


def test_same_table_and_seed_give_the_same_placement():
    names = [f"{role}{i}" for role in "pd" for i in range(3)]
    assert cluster_of(*names).place(seed=5) == cluster_of(*names).place(seed=5)


@pytest.mark.parametrize("is_cached", [False, True])
def test_burst_of_identical_requests_does_not_all_land_on_one_worker(is_cached):
    """A thousand at one moment: no report comes between them, only what was just sent counts."""
    names = [f"{role}{i}" for role in "pd" for i in range(10)]
    made = cluster_of(*names, local_prefill_max_tokens=0)
    noise, sent = Noise(random.Random(1)), Counter()
    for n in range(1000):
        placement = made.place(2000, cached={"p3": 100} if is_cached else {}, noise=noise)
        for worker_id in placement.workers:
            tokens = placement.terms_of(worker_id).uncached
            is_prefill = worker_id == placement.prefill
            made.books[worker_id].sent(
                f"r{n}", prefill_tokens=tokens * is_prefill, kv_tokens=2000, now_s=0.0
            )
            sent[worker_id] += 1
    prefills = [sent[WorkerId(f"p{i}")] for i in range(10)]
    decodes = [sent[WorkerId(f"d{i}")] for i in range(10)]
    assert sum(prefills) == sum(decodes) == 1000
    assert max(prefills) < 300 and min(prefills) > 40
    assert max(decodes) < 120 and min(decodes) > 80


def test_temperature_spreads_near_equal_workers_and_not_far_ones():
    workers = {
        "p0": {}, "p1": {"queued_prefill_tokens": 20}, "p2": {"queued_prefill_tokens": 90_000},
        "d0": {},
    }  # fmt: skip

    def counts(temperature):
        made = cluster(
            {name: dict(load) for name, load in workers.items()}, temperature=temperature
        )
        noise = Noise(random.Random(2))
        return Counter(made.place(noise=noise).prefill for _ in range(300))

    assert counts(0.0) == {"p0": 300}
    spread = counts(0.1)
    assert spread["p0"] > spread["p1"] > 50 and spread["p2"] == 0


def test_conversation_goes_back_to_its_workers_unless_they_are_busy():
    made = cluster_of("p0", "p1", "p2", "d0", "d1", "d2")
    for seed in range(10):
        assert made.place(last=("p1", "d2"), seed=seed).workers == ("p1", "d2")
    made.books["p1"].sent("x", prefill_tokens=5000, kv_tokens=0, now_s=0.0)
    assert made.place(last=("p1", "d2")).prefill != "p1"
    assert made.place(last=("gone", "d2")).decode == "d2"


# What is said of it


def test_prediction_tells_queue_and_room():
    made = cluster({"p0": {"queued_prefill_tokens": 4000}, "d0": {"num_running": 2}})
    predicted = made.place().predicted
    assert predicted.queued_s == pytest.approx(made.perf.queue_s(Role.PREFILL, 4000))
    assert predicted.ttft_s == pytest.approx(
        predicted.queued_s + made.perf.prefill_s(Role.PREFILL, 1000)
    )
    assert not predicted.needs_room
    full = cluster({"p0": {}, "d0": {"free_blocks": 1, "num_running": 2}})
    assert full.place().predicted.needs_room
    # Nobody's end would make room.
    full = cluster({"p0": {}, "d0": {"free_blocks": 1}})
    assert not full.place().predicted.needs_room


def test_terms_are_those_of_the_chosen_and_the_best_others():
    made = cluster({f"p{i}": {"queued_prefill_tokens": 100 * i} for i in range(20)} | {"d0": {}})
    placement = made.place()
    assert [t.worker_id for t in placement.terms][:2] == ["p0", "d0"]
    assert {t.worker_id for t in placement.terms} == {"p0", "p1", "p2", "p3", "p4", "d0"}
    assert placement.num_candidates == 21
    made.books["p0"].sent("x", prefill_tokens=9, kv_tokens=9, now_s=0.0)
    assert placement.terms[0].queued_prefill == 0, "terms are those of the decision"
    assert placement.terms[-1] == list(placement.terms)[-1] and len(placement.terms[1:3]) == 2
    with pytest.raises(IndexError):
        placement.terms[6]


def test_settled_placement_keeps_its_terms_and_nothing_else():
    made = cluster_of("p0", "p1", "d0")
    settled, lazy = made.place(cached={"p0": 9}), made.place(cached={"p0": 9})
    sheet = weakref.ref(settled.terms._sheet.whole_s)
    assert sheet() is not None
    assert settled.terms_of("p0") == lazy.terms_of("p0") and sheet() is not None
    settled.settle()
    assert sheet() is None and settled.terms == lazy.terms


def test_swept_laws():
    """Whatever the cluster looks like: only live workers, right roles, right pairs, none avoided
    while there are others."""
    rng = random.Random(9)
    for _ in range(400):
        workers = {
            f"{rng.choice('pd')}{i}": {
                "layout": rng.choice((LAYOUT, OTHER)),
                "model": rng.choice(("m", "m", "x")),
                "max_len": rng.choice((512, 8192)),
                "is_draining": rng.random() < 0.1,
                "queued_prefill_tokens": rng.randrange(3000),
                "resident_kv_tokens": rng.randrange(5000),
                "num_running": rng.randrange(20),
                "free_blocks": rng.randrange(1001),
            }
            for i in range(rng.randrange(9))
        }
        made = cluster({name: dict(load) for name, load in workers.items()})
        for name in workers:
            if rng.random() < 0.2:
                made.table.set_lost(WorkerId(name))
        avoid = frozenset(name for name in workers if rng.random() < 0.2)
        num_prompt = rng.choice((5, 100, 1000))
        usable = {
            row.info.worker_id: row
            for row in made.table.rows()
            if row.is_eligible
            and row.info.model_name == "m"
            and num_prompt < row.info.max_model_len
        }
        cached = {name: rng.randrange(num_prompt // 16 + 1) for name in workers}
        try:
            placement = made.place(
                num_prompt, rng.choice((1, 50)), cached=cached, avoid=avoid, seed=rng.randrange(99)
            )
        except NoWorker:
            assert not usable
            continue
        chosen = [usable[worker_id] for worker_id in placement.workers]
        if usable.keys() - avoid:
            assert not avoid.intersection(placement.workers)
        roles = [row.info.role for row in chosen]
        if placement.kind is PlacementKind.REMOTE_PREFILL:
            assert roles == [Role.PREFILL, Role.DECODE]
            assert chosen[0].info.layout == chosen[1].info.layout
        else:
            is_local = placement.kind is PlacementKind.LOCAL_PREFILL
            assert roles == [Role.DECODE if is_local else Role.PREFILL]
        if placement.offer is not None:
            assert placement.offer.source != placement.computes_prompt
            source = made.table.get(placement.offer.source)
            assert source.is_readable and source.info.layout == chosen[0].info.layout
            assert placement.offer.num_blocks - placement.offer.num_own_blocks >= 2
        placement.terms_of(placement.computes_prompt)
