"""The last requests and the edges between workers."""

from __future__ import annotations

from types import SimpleNamespace

from baton.core.lifecycle import LifecycleEvent as Event
from baton.core.lifecycle import Timeline, TransferStats
from baton.core.request import RequestId
from services.router.requests.request_record import RequestRecord
from services.router.ui import request_book
from services.router.ui.request_book import RequestBook


def record(name: str, *, num_reads: int = 1, moves: tuple = ()) -> RequestRecord:
    made = RequestRecord(RequestId(name), "m", 10)
    made.timeline = Timeline(
        {Event.ARRIVED: 1.0, Event.FIRST_TOKEN: 1.5},
        TransferStats(num_bytes=100, num_reads=num_reads),
    )
    made.placements = [SimpleNamespace(prefill="p0", decode="d0", workers=("p0", "d0"), reason="")]
    made.migrations = list(moves)
    made.num_output_tokens, made.last_token_at_s = 5, 2.5
    return made


def edges(book: RequestBook) -> dict:
    return {(s, t): (e.num_bytes, e.num_transfers, e.num_moves) for s, t, e in book.edges()}


def test_the_oldest_requests_are_forgotten():
    book = RequestBook(2)
    for name in "abc":
        book.ended(record(name))
    assert [r.request_id for r in book.newest()] == ["c", "b"]
    assert book.find("a") is None and book.find("b").request_id == "b"


def test_edges_count_hand_overs_and_moves_but_no_local_prefill():
    moved = SimpleNamespace(
        source="d0", target="d1", has_moved=True, transfer=TransferStats(num_bytes=7)
    )
    failed = SimpleNamespace(source="d0", target="d2", has_moved=False)
    book = RequestBook(10)
    book.ended(record("a", moves=(moved, failed)))
    book.ended(record("b"))
    book.ended(record("c", num_reads=0))
    assert edges(book) == {("p0", "d0"): (200, 2, 0), ("d0", "d1"): (7, 1, 1)}


def test_edges_and_what_charts_take_are_bounded(monkeypatch):
    monkeypatch.setattr(request_book, "MAX_EDGES", 2)
    book = RequestBook(3)
    for i in range(5):
        one = record(str(i))
        one.placements[0].decode = f"d{i}"
        book.ended(one)
    assert list(edges(book)) == [("p0", "d3"), ("p0", "d4")]
    taken = book.take_ended()
    assert len(taken) == 3 and (taken[0].ttft_s, taken[0].itl_s) == (0.5, 0.25)
    assert book.take_ended() == []
