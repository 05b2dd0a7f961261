from __future__ import annotations

import random

import numpy as np
import pytest

from baton.core.worker_info import LoadReport
from services.router.placement.load_book import UNREPORTED_S, Column, LoadBook

REPORT = LoadReport(
    num_running=3, num_waiting=1, queued_prefill_tokens=500, resident_kv_tokens=40,
    free_blocks=20, cached_blocks=10, total_blocks=100, leases=2, reservations=1,
)  # fmt: skip


def attached(block_size=16):
    book, column, flags = LoadBook(), np.zeros(len(Column)), []
    book.attach(column, block_size=block_size, on_flags=lambda: flags.append(True))
    return book, column, flags


def test_report_becomes_figures_in_tokens():
    book, column, _ = attached()
    book.report(REPORT, 1.0)
    assert column.tolist() == [500, 70 * 16, 30 * 16, 5, 2]
    book.report(LoadReport(resident_kv_tokens=9000, total_blocks=100, free_blocks=100), 2.0)
    assert column[Column.RESIDENT] == 9000


def test_report_before_the_block_size_is_known_is_not_lost():
    book = LoadBook()
    book.report(REPORT, 1.0)
    column = np.zeros(len(Column))
    book.attach(column, block_size=64, on_flags=lambda: None)
    assert column.tolist() == [500, 70 * 64, 30 * 64, 5, 2]


def test_sent_requests_count_until_a_report_can_contain_them():
    book, column, _ = attached()
    book.report(REPORT, 1.0)
    book.sent("a", prefill_tokens=100, kv_tokens=200, now_s=1.5)
    assert column.tolist() == [600, 70 * 16 + 200, 30 * 16 - 200, 6, 2]
    book.report(REPORT, 1.5 + UNREPORTED_S / 2)
    assert column[Column.QUEUED] == 600
    book.report(REPORT, 1.6 + UNREPORTED_S)
    assert column[Column.QUEUED] == 500 and book.num_in_flight == 1
    book.ended("a")
    assert column[Column.QUEUED] == 500 and book.num_in_flight == 0


def test_what_has_ended_before_any_report_counts_no_more():
    book, column, _ = attached()
    book.sent("a", prefill_tokens=100, kv_tokens=200, now_s=1.0)
    book.ended("a")
    assert not column.any()
    book.sent("a", prefill_tokens=7, kv_tokens=8, now_s=1.01)
    book.report(LoadReport(), 1.0 + UNREPORTED_S + 0.005)
    # The first one's place in the order of time does not take the second one along.
    assert column[Column.QUEUED] == 7
    book.check_integrity()


def test_sequences_are_at_least_those_in_flight():
    book, column, _ = attached()
    for n in range(4):
        book.sent(str(n), prefill_tokens=0, kv_tokens=0, now_s=0.0)
    book.report(LoadReport(num_running=1), 9.0)
    assert column[Column.SEQUENCES] == 4


def test_requests_of_other_routers_count_until_the_next_report():
    book, column, _ = attached()
    book.sent("x", prefill_tokens=50, kv_tokens=60, now_s=0.0, is_ours=False)
    assert column[Column.QUEUED] == 50 and column[Column.SEQUENCES] == 1
    assert book.num_in_flight == 0
    book.report(LoadReport(), 1.0)
    assert not column.any()
    book.check_integrity()


def test_lost_session_takes_along_what_was_sent():
    book, column, _ = attached()
    book.report(REPORT, 0.0)
    book.sent("a", prefill_tokens=5, kv_tokens=5, now_s=1.0)
    book.clear()
    assert column[Column.QUEUED] == 500 and book.num_in_flight == 0
    book.check_integrity()


def test_flags_are_told_once_per_change():
    book, _, flags = attached()
    book.report(LoadReport(), 0.0)
    assert not flags
    book.report(LoadReport(is_draining=True), 1.0)
    book.report(LoadReport(is_draining=True), 2.0)
    assert len(flags) == 1 and book.is_draining
    book.report(LoadReport(is_unhealthy=True), 3.0)
    assert len(flags) == 2 and book.is_unhealthy and not book.is_draining


@pytest.mark.parametrize("seed", range(4))
def test_random_walk_against_a_list_of_what_was_sent(seed):
    rng, now_s = random.Random(seed), 0.0
    book, column, _ = attached()
    sent, last, seen_s = {}, LoadReport(), -1.0
    for step in range(4000):
        now_s += rng.choice((0.0, 0.001, 0.03))
        action = rng.random()
        if action < 0.4:
            name, ours = f"r{step}", rng.random() < 0.8
            tokens = rng.randrange(1000), rng.randrange(1000)
            book.sent(
                name, prefill_tokens=tokens[0], kv_tokens=tokens[1], now_s=now_s, is_ours=ours
            )
            sent[name] = (now_s, *tokens, ours)
        elif action < 0.7:
            ours = [name for name, entry in sent.items() if entry[3]]
            if ours:
                name = rng.choice(ours)
                book.ended(name)
                del sent[name]
        elif action < 0.99:
            last = LoadReport(
                queued_prefill_tokens=rng.randrange(5000), num_running=rng.randrange(9),
                free_blocks=rng.randrange(50), total_blocks=100,
            )  # fmt: skip
            book.report(last, now_s)
            seen_s = now_s - UNREPORTED_S
            sent = {n: e for n, e in sent.items() if e[3] or e[0] >= seen_s}
        else:
            book.clear()
            sent = {}
        recent = [entry for entry in sent.values() if entry[0] >= seen_s]
        assert column[Column.QUEUED] == last.queued_prefill_tokens + sum(e[1] for e in recent)
        kv = sum(e[2] for e in recent)
        assert column[Column.AVAILABLE] == max(0, 16 * last.free_blocks - kv)
        assert book.num_in_flight == sum(e[3] for e in sent.values())
        book.check_integrity()
