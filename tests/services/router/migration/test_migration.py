from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest

from baton.core.kv_layout import KvLayout
from baton.core.worker_info import LoadReport, Role, WorkerInfo
from services.router.config import MigrationConfig
from services.router.migration.handover import Trigger
from services.router.migration.migration import (
    GROWTH_TOKENS,
    MigrationPlanner,
    Move,
    RunningRequest,
)
from services.router.workers.cluster_view import ClusterView, WorkerState

LAYOUT = KvLayout("m", 2, 1, 8, 16, "float32")
OTHER = dataclasses.replace(LAYOUT, model_id="n")
CONFIG = MigrationConfig()


def worker(
    name, available=1000, *, layout=LAYOUT, model="m", lost=False, leaving=False, max_seqs=32,
    max_len=8192, **load,
):  # fmt: skip
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    info = WorkerInfo(
        name, "1", role, f"h:{name}", model, layout, 1000, max_len, max_seqs, "fake", 1
    )
    report = LoadReport(free_blocks=available, **{"total_blocks": 1000, **load})
    return WorkerState(info, report, is_quarantined=lost, is_leaving=leaving)


def request(name, on="d0", num_tokens=800, left=500, **kw):
    return RunningRequest(name, on, num_tokens, left, **kw)


def plan(workers, running, *, planner=None, under_way=(), now_s=0.0, config=CONFIG):
    planner = planner or MigrationPlanner(config)
    return planner.plan(ClusterView(tuple(workers)), running, list(under_way), now_s)


def pairs(moves):
    return {m.wire_id: (m.source, m.target) for m in moves}


# Drain.


@pytest.mark.parametrize("ending", [{"is_draining": True}, {"leaving": True}])
def test_all_requests_of_an_ending_worker_move(ending):
    workers = [worker("d0", **ending), worker("d1"), worker("p0")]
    moves = plan(workers, [request("a"), request("b", left=1)])
    assert pairs(moves) == {"a": ("d0", "d1"), "b": ("d0", "d1")}
    assert {m.trigger for m in moves} == {Trigger.DRAIN}


def test_those_with_most_left_to_do_go_first():
    config = dataclasses.replace(CONFIG, max_concurrent=2)
    running = [request(n, left=left) for n, left in (("a", 5), ("b", 900), ("c", 400))]
    moves = plan([worker("d0", is_draining=True), worker("d1")], running, config=config)
    assert [m.wire_id for m in moves] == ["b", "c"]


def test_room_is_found_where_most_of_it_is():
    workers = [worker("d0", is_draining=True), worker("d1", 300), worker("d2", 310)]
    moves = plan(workers, [request(n, num_tokens=1600) for n in "abcd"])
    # 116 blocks each: the second finds d1 roomier, and so on.
    assert Counter(m.target for m in moves) == {"d1": 2, "d2": 2}


def test_request_stays_when_nobody_has_room_for_it():
    tight = worker("d1", 110)
    assert not plan([worker("d0", is_draining=True), tight], [request("a", num_tokens=1600)])
    # A smaller one behind it still goes.
    moves = plan(
        [worker("d0", is_draining=True), tight],
        [request("a", num_tokens=1600, left=900), request("b", num_tokens=160)],
    )
    assert list(pairs(moves)) == ["b"]


@pytest.mark.parametrize(
    "unfit",
    [
        {"lost": True},
        {"is_unhealthy": True},
        {"is_draining": True},
        {"leaving": True},
        {"layout": OTHER},
        {"model": "x"},
        {"num_running": 32},
        {"max_len": 4096},
        {"total_blocks": 0, "available": 0},
    ],
)
def test_unfit_workers_are_no_targets(unfit):
    workers = [worker("d0", is_draining=True), worker("d1", **unfit)]
    assert not plan(workers, [request("a")])


def test_broken_worker_is_no_source():
    for broken in ({"lost": True}, {"is_unhealthy": True}):
        assert not plan([worker("d0", 10, **broken), worker("d1")], [request("a")])


def test_prefill_pool_takes_over_only_from_the_last_decode_worker():
    assert not plan(
        [worker("d0", is_draining=True), worker("d1", 10), worker("p0")], [request("a")]
    )
    moves = plan([worker("d0", is_draining=True), worker("p0")], [request("a")])
    assert pairs(moves) == {"a": ("d0", "p0")}
    assert not plan([worker("d0", 10), worker("p0")], [request("a")]), "not for pressure"


def test_barred_workers_are_left_out():
    workers = [worker("d0", is_draining=True), worker("d1"), worker("d2", 500)]
    moves = plan(workers, [request("a", barred=frozenset({"d1"}))])
    assert pairs(moves) == {"a": ("d0", "d2")}


def test_moves_under_way_count_at_both_ends():
    config = dataclasses.replace(CONFIG, max_concurrent=2)
    draining = [worker("d0", is_draining=True), worker("d1", is_draining=True)]
    under_way = [Move("x", "d0", "d2", Trigger.DRAIN, 100, "")]
    running = [request("a"), request("b"), request("c", on="d1")]
    moves = plan([*draining, worker("d2")], running, under_way=under_way, config=config)
    assert len(moves) == 1
    moves = plan(
        [*draining, worker("d2"), worker("d3")], running, under_way=under_way, config=config
    )
    assert len(moves) == 2 and {m.source for m in moves} == {"d0", "d1"}


# Pressure.


def test_pressure_begins_below_the_low_watermark_and_ends_at_the_high_one():
    planner = MigrationPlanner(CONFIG)
    found = {}
    for available in (1000, 200, 51, 50, 49, 60, 149, 150, 60, 50, 40):
        view = ClusterView((worker("d0", available),))
        found[len(found), available] = bool(planner.sources(view))
    assert found == {
        (0, 1000): False, (1, 200): False, (2, 51): False, (3, 50): False,
        (4, 49): True, (5, 60): True, (6, 149): True,
        (7, 150): False, (8, 60): False, (9, 50): False, (10, 40): True,
    }  # fmt: skip


def test_watermarks_swept():
    """Whatever the load does, the state is that of the last watermark crossed."""
    rng = random.Random(5)
    planner, is_pressed = MigrationPlanner(CONFIG), False
    for _ in range(2000):
        available = rng.choice(
            (rng.randrange(1001), rng.randrange(30, 70), rng.randrange(130, 170))
        )
        if available < 50:
            is_pressed = True
        elif available >= 150:
            is_pressed = False
        sources = planner.sources(ClusterView((worker("d0", available),)))
        assert (sources == {"d0": Trigger.PRESSURE}) == is_pressed


def test_blocks_that_were_promised_count_as_taken():
    state = dataclasses.replace(worker("d0", 60), unreported_kv_tokens=400)
    assert MigrationPlanner(CONFIG).sources(ClusterView((state,)))


def test_prefill_workers_are_never_under_pressure():
    assert not MigrationPlanner(CONFIG).sources(ClusterView((worker("p0", 1),)))


def test_most_kv_per_token_to_come_goes_first_and_no_more_than_needed():
    running = [
        request("small", num_tokens=160, left=200),
        request("large", num_tokens=1600, left=400),
        request("longer", num_tokens=1600, left=4000),
        request("ending", num_tokens=4000, left=CONFIG.min_remaining_tokens - 1),
    ]
    moves = plan([worker("d0", 49), worker("d1")], running)
    # 49 + 100 blocks are still below 150.
    assert [m.wire_id for m in moves] == ["large", "small"]
    assert moves[0].reason == "49 of 1000 blocks available; it holds 100 for 400 tokens"


def test_target_is_never_brought_under_pressure():
    needed = LAYOUT.num_blocks_for(800 + GROWTH_TOKENS)
    assert plan([worker("d0", 49), worker("d1", 150 + needed)], [request("a")])
    assert not plan([worker("d0", 49), worker("d1", 149 + needed)], [request("a")])
    # A worker that ends may fill its targets a little more.
    ending = worker("d0", is_draining=True)
    assert plan([ending, worker("d1", 50 + needed)], [request("a")])
    assert not plan([ending, worker("d1", 49 + needed)], [request("a")])


def test_request_that_ends_soon_needs_no_room_to_grow():
    assert plan(
        [worker("d0", is_draining=True), worker("d1", 50 + LAYOUT.num_blocks_for(801))],
        [request("a", left=1)],
    )


def test_blocks_on_their_way_out_are_not_freed_twice():
    under_way = [Move("x", "d0", "d1", Trigger.PRESSURE, 1616, "")]
    assert not plan([worker("d0", 49), worker("d1")], [request("a")], under_way=under_way)


def test_load_that_does_not_show_a_move_yet_causes_no_other():
    planner = MigrationPlanner(CONFIG)
    workers = [worker("d0", 49), worker("d1")]
    (move,) = plan(workers, [request("a", num_tokens=1616)], planner=planner)
    planner.moved(move, 101, now_s=1.0)
    assert not plan(workers, [request("b")], planner=planner, now_s=1.1)
    assert plan(workers, [request("b")], planner=planner, now_s=2.0)


def test_moved_request_stays_a_while_unless_its_worker_ends():
    planner = MigrationPlanner(CONFIG)
    planner.moved(Move("a", "d1", "d0", Trigger.PRESSURE, 800, ""), 50, now_s=0.0)
    pressed = [worker("d0", 49), worker("d1")]
    assert not plan(pressed, [request("a")], planner=planner, now_s=9.0)
    ending = [worker("d0", is_draining=True), worker("d1")]
    assert plan(ending, [request("a")], planner=planner, now_s=9.0)
    assert plan(pressed, [request("a")], planner=planner, now_s=11.0)


def test_failed_target_and_kept_request_rest():
    planner = MigrationPlanner(CONFIG)
    workers = [worker("d0", is_draining=True), worker("d1")]
    (move,) = plan(workers, [request("a")], planner=planner)
    planner.kept(move, 0.0)
    assert not plan(workers, [request("a")], planner=planner, now_s=0.5)
    assert plan(workers, [request("b")], planner=planner, now_s=0.5), "the target has not failed"
    planner.target_failed(move, 0.5)
    assert not plan(workers, [request("b")], planner=planner, now_s=1.0)
    assert plan([*workers, worker("d2")], [request("b")], planner=planner, now_s=1.0)
    assert plan(workers, [request("a")], planner=planner, now_s=2.0)


# Swept.


def test_swept_laws():
    """Whatever the cluster looks like, no move breaks a rule."""
    rng = random.Random(11)
    num_moves = 0
    for _ in range(1500):
        config = dataclasses.replace(CONFIG, max_concurrent=rng.choice((1, 2, 4)))
        workers = [
            worker(
                f"{rng.choice('ddp')}{n}",
                rng.choice((20, 45, 120, 250, 1000)),
                layout=rng.choice((LAYOUT, LAYOUT, OTHER)),
                lost=rng.random() < 0.1,
                is_draining=rng.random() < 0.2,
                is_unhealthy=rng.random() < 0.1,
                num_running=rng.choice((0, 5, 31)),
            )
            for n in range(rng.randrange(1, 7))
        ]
        by_id = {w.info.worker_id: w for w in workers}
        running = [
            request(
                f"r{n}", rng.choice(list(by_id)), rng.choice((16, 800, 3200)),
                rng.choice((1, 63, 64, 5000)), barred=frozenset(rng.sample(sorted(by_id), 1)),
            )
            for n in range(rng.randrange(12))
        ]  # fmt: skip
        moves = plan(workers, running, config=config)
        num_moves += len(moves)
        _check_laws(by_id, running, moves, config)
    assert num_moves > 200


def _check_laws(by_id, running, moves, config):
    requests = {r.wire_id: r for r in running}
    assert len({m.wire_id for m in moves}) == len(moves), "a request twice"
    coming, leaving, taken = Counter(), Counter(), Counter()
    for move in moves:
        r, source, target = requests[move.wire_id], by_id[move.source], by_id[move.target]
        assert r.worker_id == move.source != move.target
        assert move.target not in r.barred
        assert source.is_readable and target.is_eligible
        assert source.info.layout == target.info.layout
        if move.trigger is Trigger.DRAIN:
            assert source.is_ending
        else:
            assert source.available_blocks < 50 and source.info.role is Role.DECODE
            assert target.info.role is Role.DECODE
            assert r.num_tokens_left >= config.min_remaining_tokens
        coming[move.target] += 1
        leaving[move.source] += 1
        taken[move.target] += LAYOUT.num_blocks_for(r.num_tokens + min(r.num_tokens_left, 256))
    assert max([*coming.values(), *leaving.values()], default=0) <= config.max_concurrent
    for move in moves:
        target = by_id[move.target]
        relieving = {m.target for m in moves if m.trigger is Trigger.PRESSURE}
        keep = 150 if move.target in relieving else 50
        assert target.available_blocks - taken[move.target] >= keep
        assert target.num_sequences + coming[move.target] <= target.info.max_num_seqs


def test_random_walk_with_growing_sequences_never_passes_a_request_back_and_forth():
    """A model of four decode workers whose sequences grow, end and move, seen with a delay."""
    rng = random.Random(3)
    planner = MigrationPlanner(CONFIG)
    names = [f"d{n}" for n in range(4)]
    seqs: dict[str, list] = {}  # wire id -> [worker, tokens, left]
    moved_at: dict[str, float] = {}
    draining: set[str] = set()
    count = Counter()
    under_way: dict[str, Move] = {}

    def used(name):
        return sum(LAYOUT.num_blocks_for(tokens) for w, tokens, _ in seqs.values() if w == name)

    now_s, shown = 0.0, dict.fromkeys(names, 0)
    for step in range(6000):
        now_s += 0.05
        if step % 4 == 0:
            shown = {name: used(name) for name in names}
        if len(seqs) < 70 and rng.random() < 0.4:
            free = [n for n in names if used(n) < 900 and n not in draining]
            if free:
                seqs[f"r{step}"] = [
                    rng.choice(free[:2]), rng.randrange(100, 1500), rng.randrange(20, 3000)
                ]  # fmt: skip
        for wire_id, seq in list(seqs.items()):
            seq[1], seq[2] = seq[1] + 8, seq[2] - 8
            if seq[2] <= 0 or used(seq[0]) > 1000:
                count["ended"] += 1
                del seqs[wire_id]
                if (move := under_way.pop(wire_id, None)) is not None:
                    planner.kept(move, now_s)
        if rng.random() < 0.005:
            draining = set(rng.sample(names, rng.choice((0, 1))))
        view = ClusterView(
            tuple(worker(n, max(0, 1000 - shown[n]), is_draining=n in draining) for n in names)
        )
        running = [
            RunningRequest(wire_id, *seq)
            for wire_id, seq in seqs.items()
            if wire_id not in under_way
        ]
        for move in planner.plan(view, running, list(under_way.values()), now_s):
            assert move.wire_id not in under_way and move.target not in draining
            if move.trigger is Trigger.PRESSURE:
                assert now_s - moved_at.get(move.wire_id, -99.0) >= CONFIG.min_stay_s
            under_way[move.wire_id] = move
        for end in (Counter(m.source for m in under_way.values()),
                    Counter(m.target for m in under_way.values())):  # fmt: skip
            assert max(end.values(), default=0) <= CONFIG.max_concurrent
        for wire_id, move in list(under_way.items()):
            what = rng.random()
            if what < 0.3:
                del under_way[wire_id]
                seqs[wire_id][0], moved_at[wire_id] = move.target, now_s
                planner.moved(move, LAYOUT.num_blocks_for(move.num_tokens), now_s)
                count[move.trigger] += 1
            elif what < 0.35:
                del under_way[wire_id]
                planner.kept(move, now_s)
                planner.target_failed(move, now_s)
                count["failed"] += 1
    assert min(count[k] for k in (Trigger.DRAIN, Trigger.PRESSURE, "failed")) > 10, count
    planner.plan(ClusterView((worker("d0", 1),)), [], [], now_s + 1000)
    assert not planner._stays_until_s and not planner._relief
    assert not len(planner._requests) and not len(planner._targets)
