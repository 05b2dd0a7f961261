from __future__ import annotations

import dataclasses
import random

import pytest

from baton.core.fabric import FabricReport, LinkReport
from baton.core.worker_info import Epoch, WorkerId
from services.router.placement.load_book import Column, LoadBook
from services.router.placement.worker_table import FIRST_CAPACITY, WorkerTable
from tests.support.worker_tables import LAYOUT, cluster_of, load_report, worker_info

OTHER = dataclasses.replace(LAYOUT, model_id="n")


def names(pool):
    return [info.worker_id for info in pool.candidates]


def test_pool_holds_prefill_workers_first():
    cluster = cluster_of("d0", "p0", "d1", "p1")
    (pool,) = cluster.table.pools("m")
    assert names(pool) == ["p0", "p1", "d0", "d1"] and pool.num_prefill == 2
    assert pool.position[WorkerId("d1")] == 3
    assert [pool.worker_id(i) for i in range(4)] == names(pool)


def test_layouts_and_models_are_kept_apart():
    cluster = cluster_of("p0", "d0")
    cluster.add("p1", {"layout": OTHER})
    cluster.add("p2", {"model": "x"})
    assert [names(pool) for pool in cluster.table.pools("m")] == [["p0", "d0"], ["p1"]]
    assert [names(pool) for pool in cluster.table.pools("x")] == [["p2"]]
    assert cluster.table.pools("unknown") == ()


@pytest.mark.parametrize("state", ["lost", "leaving", "draining", "unhealthy"])
def test_who_takes_no_work_is_no_candidate_until_it_does_again(state):
    cluster = cluster_of("p0", "d0", "d1")
    table, worker_id = cluster.table, WorkerId("d1")
    assert len(names(*table.pools("m"))) == 3
    if state == "lost":
        table.set_lost(worker_id)
    elif state == "leaving":
        table.set_leaving(worker_id, True)
    else:
        cluster.books["d1"].report(load_report(**{f"is_{state}": True}), 1.0)
    (pool,) = table.pools("m")
    assert names(pool) == ["p0", "d0"]
    # What it caches can be read as long as its engine answers.
    assert len(pool.members) == (3 if state in ("leaving", "draining") else 2)
    table.check_integrity()
    table.set_leaving(worker_id, False)
    cluster.books["d1"].report(load_report(), 2.0)
    table.join(worker_info("d1"), cluster.books["d1"], slot=2)
    assert len(names(*table.pools("m"))) == 3
    table.check_integrity()


def test_load_is_read_where_books_write_it():
    cluster = cluster_of("p0", "d0")
    (pool,) = cluster.table.pools("m")
    cluster.books["d0"].report(load_report(queued_prefill_tokens=77), 1.0)
    assert pool.loads()[Column.QUEUED].tolist() == [0, 77]
    assert cluster.table.pools("m")[0] is pool


def test_table_grows_and_rows_are_used_again():
    table, books = WorkerTable(), {}
    for n in range(3 * FIRST_CAPACITY):
        name = f"p{n}"
        books[name] = LoadBook()
        table.join(worker_info(name), books[name], slot=n)
        books[name].report(load_report(queued_prefill_tokens=n), 0.0)
    table.check_integrity()
    (pool,) = table.pools("m")
    assert pool.loads()[Column.QUEUED].tolist() == list(range(3 * FIRST_CAPACITY))
    for n in range(0, 3 * FIRST_CAPACITY, 2):
        table.leave(WorkerId(f"p{n}"))
    table.leave(WorkerId("nobody"))
    table.check_integrity()
    books["p0"].report(load_report(queued_prefill_tokens=9), 1.0)
    table.join(worker_info("d9"), LoadBook(), slot=500)
    table.check_integrity()
    assert len(table) == 3 * FIRST_CAPACITY // 2 + 1


def test_new_process_of_the_same_id_starts_without_measured_links():
    cluster = cluster_of("p0", "d0")
    table = cluster.table
    report = FabricReport((LinkReport(WorkerId("p0"), Epoch("1"), "fake", "", 1e6),))
    table.report_links(WorkerId("d0"), report)
    assert table.pools("m")[0].pair_seconds[0, 0] == pytest.approx(1e-6)
    # The same process in a new session: nothing changes.
    table.join(worker_info("p0"), cluster.books["p0"], slot=0)
    assert table.pools("m")[0].pair_seconds[0, 0] == pytest.approx(1e-6)
    table.join(worker_info("p0", epoch="2"), LoadBook(), slot=0)
    assert table.pools("m")[0].pair_seconds[0, 0] == pytest.approx(1e-9)
    table.report_links(WorkerId("d0"), report)
    table.report_links(WorkerId("stranger"), report)
    assert table.pools("m")[0].pair_seconds[0, 0] == pytest.approx(1e-9)
    table.check_integrity()


def test_link_reported_before_the_peer_is_known_counts_when_it_joins():
    cluster = cluster_of("d0")
    link = LinkReport(WorkerId("p0"), Epoch("1"), "fake", "", 1e6)
    cluster.table.report_links(WorkerId("d0"), FabricReport((link,)))
    cluster.add("p0")
    assert cluster.table.pools("m")[0].pair_seconds[0, 0] == pytest.approx(1e-6)
    cluster.table.check_integrity()


def test_every_report_is_told():
    told = []
    table = WorkerTable(on_load=lambda: told.append(True))
    book = LoadBook()
    table.join(worker_info("p0"), book, slot=0)
    book.report(load_report(), 0.0)
    book.report(load_report(), 1.0)
    assert len(told) == 2
    table.leave(WorkerId("p0"))
    book.report(load_report(), 2.0)
    assert len(told) == 2


def test_pool_without_some():
    cluster = cluster_of("p0", "p1", "d0")
    cluster.add("d1", {"max_len": 500})
    (pool,) = cluster.table.pools("m")
    assert pool.without(num_prompt_tokens=499) is pool
    assert pool.without(avoid={WorkerId("x")}) is pool
    cut = pool.without(num_prompt_tokens=500, avoid={WorkerId("p0")})
    assert names(cut) == ["p1", "d0"] and len(cut.members) == 4
    assert pool.without(num_prompt_tokens=501, avoid={WorkerId("p0")}) is cut
    assert pool.without(avoid=set(names(pool))) is None
    for n in range(100):
        pool.without(avoid={WorkerId(f"p{n % 2}"), WorkerId(f"d{n % 3}")})
    cluster.books["p1"].sent("x", prefill_tokens=5, kv_tokens=0, now_s=0.0)
    assert cut.loads()[Column.QUEUED, 0] == 5


@pytest.mark.parametrize("seed", range(3))
def test_random_walk_equals_a_fresh_rebuild(seed):
    rng = random.Random(seed)
    table, books, now_s, epochs = WorkerTable(), {}, 0.0, {}
    ids = [f"{role}{n}" for role in "pd" for n in range(25)]
    for step in range(2500):
        now_s += 0.01
        name = rng.choice(ids)
        worker_id, action = WorkerId(name), rng.random()
        if action < 0.25 or name not in books:
            is_new = name not in books or rng.random() < 0.3
            if is_new:
                books[name] = LoadBook()
                epochs[name] = str(step)
            info = worker_info(
                name,
                epoch=epochs[name],
                host=rng.choice("abc") if is_new else table.get(worker_id).info.address[:-2],
                layout=rng.choice((LAYOUT, OTHER)),
            )
            table.join(info, books[name], slot=ids.index(name))
        elif action < 0.35:
            table.leave(worker_id)
            del books[name]
        elif action < 0.45:
            table.set_lost(worker_id)
            books[name].clear()
        elif action < 0.5:
            table.set_leaving(worker_id, rng.random() < 0.5)
        elif action < 0.7:
            peer = rng.choice(ids)
            link = LinkReport(
                WorkerId(peer), Epoch(epochs.get(peer, "")), rng.choice(("", "fake", "shm")), "",
                rng.choice((0.0, 1e6, 1e9)), 0.001, rng.choice(("", "no way")),
            )  # fmt: skip
            if peer != name:
                table.report_links(worker_id, FabricReport((link,)))
        elif action < 0.9:
            load = load_report(
                queued_prefill_tokens=rng.randrange(99), is_draining=rng.random() < 0.1,
                is_unhealthy=rng.random() < 0.1,
            )  # fmt: skip
            books[name].report(load, now_s)
        else:
            books[name].sent(f"r{step}", prefill_tokens=9, kv_tokens=9, now_s=now_s)
        if rng.random() < 0.5:
            table.pools("m")
        if step % 3 == 0:
            table.check_integrity()
    assert len(table) == len(books)
