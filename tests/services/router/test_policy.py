from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

import pytest

from baton.core.errors import NoWorker
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import LoadReport, Role, WorkerInfo
from services.router.cluster_view import ClusterView, WorkerState
from services.router.config import PolicyConfig
from services.router.policy import PlacementKind, PlacementRequest, place

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")
OTHER = dataclasses.replace(LAYOUT, model_id="n")
CONFIG = PolicyConfig()


def worker(name, *, layout=LAYOUT, model="m", max_len=8192, quarantined=False, **load):
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    info = WorkerInfo(name, "1", role, f"h:{name}", model, layout, 1000, max_len, 32, "fake", 1)
    load = {"free_blocks": 1000, "total_blocks": 1000, **load}
    return WorkerState(info, LoadReport(**load), is_quarantined=quarantined)


def request(num_prompt=1000, max_tokens=100, **kw):
    return PlacementRequest("m", num_prompt, max_tokens, **kw)


def choose(workers, req=None, *, config=CONFIG, seed=0):
    return place(ClusterView(tuple(workers)), req or request(), config, random.Random(seed))


def test_pair_is_chosen_for_a_long_prompt():
    placement = choose([worker("p0"), worker("d0")])
    assert placement.kind is PlacementKind.REMOTE_PREFILL
    assert (placement.prefill, placement.decode) == ("p0", "d0")
    assert {t.worker_id for t in placement.terms} == {"p0", "d0"}


def test_queue_drives_away_and_cached_prefix_attracts():
    busy, idle = worker("p0", queued_prefill_tokens=500), worker("p1")
    assert choose([busy, idle, worker("d0")]).prefill == "p1"
    cached = request(cached_tokens={"p0": 800})
    assert choose([busy, idle, worker("d0")], cached).prefill == "p0"
    slightly = request(cached_tokens={"p0": 400})
    assert choose([busy, idle, worker("d0")], slightly).prefill == "p1"


def test_requests_just_sent_count_before_they_are_reported():
    sent = dataclasses.replace(worker("p0"), unreported_prefill_tokens=600)
    assert choose([sent, worker("p1"), worker("d0")]).prefill == "p1"
    sent = dataclasses.replace(worker("d0"), unreported_kv_tokens=600)
    assert choose([worker("p0"), sent, worker("d1")]).decode == "d1"


def test_decode_goes_where_kv_and_batch_are_small():
    full = worker("d0", resident_kv_tokens=8000, free_blocks=500)
    assert choose([worker("p0"), full, worker("d1")]).decode == "d1"
    wide = worker("d0", num_running=10)
    assert choose([worker("p0"), wide, worker("d1", num_running=2)]).decode == "d1"


def test_worker_without_room_is_avoided_though_its_batch_is_small():
    tight = worker("d0", free_blocks=10, total_blocks=60)
    roomy = worker("d1", resident_kv_tokens=1500, free_blocks=900)
    assert choose([worker("p0"), tight, roomy]).decode == "d1"


@pytest.mark.parametrize(
    ("num_prompt", "cached", "kind"),
    [
        (64, 0, PlacementKind.LOCAL_PREFILL),
        (65, 0, PlacementKind.REMOTE_PREFILL),
        (1000, 960, PlacementKind.LOCAL_PREFILL),
        (1000, 900, PlacementKind.REMOTE_PREFILL),
    ],
)
def test_few_uncached_tokens_are_computed_where_they_are_needed(num_prompt, cached, kind):
    workers = [worker("p0"), worker("d0")]
    placement = choose(workers, request(num_prompt, cached_tokens={"d0": cached}))
    assert placement.kind is kind
    if kind is PlacementKind.LOCAL_PREFILL:
        assert placement.prefill is None and placement.decode == "d0"


def test_decode_worker_busy_with_prefills_gets_no_more_of_them():
    workers = [worker("p0"), worker("d0", queued_prefill_tokens=300)]
    assert choose(workers, request(20)).kind is PlacementKind.REMOTE_PREFILL


def test_one_pool_stands_in_for_the_other():
    placement = choose([worker("d0"), worker("d1")])
    assert placement.kind is PlacementKind.LOCAL_PREFILL and placement.prefill is None
    placement = choose([worker("p0"), worker("d0", quarantined=True)])
    assert placement.kind is PlacementKind.PREFILL_ONLY and placement.decode is None
    assert placement.prefill == "p0"


def test_single_token_stays_on_the_prefill_worker():
    placement = choose([worker("p0"), worker("d0")], request(max_tokens=1))
    assert placement.kind is PlacementKind.PREFILL_ONLY


def test_only_interchangeable_layouts_are_paired():
    workers = [
        worker("p0", layout=OTHER),
        worker("p1", queued_prefill_tokens=5000),
        worker("d0"),
        worker("d1", layout=OTHER, resident_kv_tokens=10_000),
    ]
    for seed in range(20):
        placement = choose(workers, seed=seed)
        assert (placement.prefill, placement.decode) in {("p0", "d1"), ("p1", "d0")}


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ([], "no worker for model"),
        ([worker("p0", model="x")], "no worker for model"),
        ([worker("d0", quarantined=True)], "1 do not answer"),
        ([worker("d0", is_draining=True)], "1 are draining"),
        ([worker("d0", max_len=500)], "longest context served now is 500"),
    ],
)
def test_nobody_is_a_readable_error(workers, message):
    with pytest.raises(NoWorker, match=message):
        choose(workers)


def test_avoided_workers_are_the_last_resort():
    workers = [worker("p0"), worker("d0"), worker("d1", resident_kv_tokens=9000)]
    assert choose(workers, request(avoid=frozenset({"d0"}))).decode == "d1"
    placement = choose(workers, request(avoid=frozenset({"d0", "d1"})))
    assert placement.kind is PlacementKind.PREFILL_ONLY
    placement = choose(workers, request(avoid=frozenset({"p0", "d0", "d1"})))
    assert placement.kind is PlacementKind.REMOTE_PREFILL


def test_equal_workers_share_the_work():
    workers = [worker(f"p{i}") for i in range(4)] + [worker(f"d{i}") for i in range(4)]
    rng, view = random.Random(3), ClusterView(tuple(workers))
    chosen = [place(view, request(), CONFIG, rng) for _ in range(800)]
    for counts in (Counter(p.prefill for p in chosen), Counter(p.decode for p in chosen)):
        assert len(counts) == 4 and min(counts.values()) > 140


def test_same_view_and_seed_give_the_same_placement():
    workers = [worker(f"p{i}") for i in range(3)] + [worker(f"d{i}") for i in range(3)]
    assert choose(workers, seed=5) == choose(workers, seed=5)


def test_attention_makes_long_contexts_dearer_than_their_tokens():
    def cost(tokens, cached=0):
        placement = choose(
            [worker("p0", max_len=10**6, free_blocks=10**6, total_blocks=10**6)],
            request(tokens, cached_tokens={"p0": cached}),
        )
        return placement.terms[0].prefill_cost

    assert 1000 < cost(1000) < 1020
    assert cost(64_000) > 1.5 * 64_000
    assert cost(33_000, cached=32_000) > cost(1000)
    assert cost(1, cached=0) >= 1


def test_swept_laws():
    """Whatever the cluster looks like: only live workers, right roles, right pairs, and no other
    pair of the same layout is cheaper."""
    rng = random.Random(9)
    for _ in range(600):
        workers = [
            worker(
                f"{rng.choice('pd')}{i}",
                layout=rng.choice((LAYOUT, OTHER)),
                model=rng.choice(("m", "m", "x")),
                max_len=rng.choice((512, 8192)),
                quarantined=rng.random() < 0.2,
                is_draining=rng.random() < 0.1,
                queued_prefill_tokens=rng.randrange(3000),
                resident_kv_tokens=rng.randrange(5000),
                num_running=rng.randrange(20),
                free_blocks=rng.randrange(1001),
            )
            for i in range(rng.randrange(9))
        ]
        avoid = frozenset(w.info.worker_id for w in workers if rng.random() < 0.2)
        cached = {w.info.worker_id: rng.randrange(2000) for w in workers}
        req = request(
            rng.choice((5, 100, 1000)), rng.choice((1, 50)), cached_tokens=cached, avoid=avoid
        )
        usable = {
            w.info.worker_id: w
            for w in workers
            if w.is_eligible
            and w.info.model_name == "m"
            and req.num_prompt_tokens < w.info.max_model_len
        }
        try:
            placement = choose(workers, req, seed=rng.random())
        except NoWorker:
            assert not usable
            continue
        chosen = [usable[w] for w in placement.workers]
        assert chosen
        if usable.keys() - avoid:
            assert not avoid.intersection(placement.workers)
        if placement.kind is PlacementKind.REMOTE_PREFILL:
            prefill, decode = (usable[placement.prefill], usable[placement.decode])
            assert prefill.info.role is Role.PREFILL and decode.info.role is Role.DECODE
            assert prefill.info.layout == decode.info.layout
            terms = {t.worker_id: t for t in placement.terms}
            pairs = [
                (p, d)
                for p, d in itertools.product(terms.values(), terms.values())
                if p.role is Role.PREFILL and d.role is Role.DECODE
            ]
            assert placement.score == min(p.prefill_cost + d.decode_cost for p, d in pairs)
        elif placement.kind is PlacementKind.LOCAL_PREFILL:
            assert chosen[0].info.role is Role.DECODE
        else:
            assert chosen[0].info.role is Role.PREFILL
