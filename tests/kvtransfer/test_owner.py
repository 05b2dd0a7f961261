"""LeaseOwner: the owner's state machine under a manual clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from baton.core.block import BlockId
from baton.core.request import RequestId
from baton.core.worker_info import Epoch
from kvtransfer.messages import (
    ChunkReady,
    Complete,
    GiveUp,
    LayersRead,
    LayersReady,
    LeaseId,
    Renew,
    Watch,
)
from kvtransfer.owner import LeasePrefix, OwnerEffect, Send
from owner_harness import (
    EPOCH,
    FILL,
    FIRST,
    OTHER,
    READER,
    Harness,
    R,
    chunks,
    refusals,
    releases,
    verdicts,
)


def test_chunks_are_announced_and_the_lease_ends_with_completion():
    h = Harness()
    assert h.owner.receive(READER, Watch(R)) == []
    (first,) = chunks(h.chunk(0, 2))
    (last,) = chunks(h.chunk(2, 1, is_last=True))
    assert (first.first_block_index, first.block_ids, first.is_last) == (0, (100, 101), False)
    assert (last.first_block_index, last.block_ids, last.is_last) == (2, (102,), True)
    assert last.first_token is FIRST and first.first_token is None
    assert first.lease_id == last.lease_id and first.epoch == EPOCH
    effects = h.owner.receive(READER, Complete(last.lease_id, EPOCH))
    assert verdicts(effects) == [True] and releases(effects) == [R]
    h.finish()


def test_watch_after_the_chunks_gets_all_of_them_at_once():
    h = Harness()
    assert chunks(h.chunk(0, 2)) == []
    assert chunks(h.chunk(2, 1, is_last=True)) == []
    (whole,) = chunks(h.owner.watch(R, READER))
    assert whole.block_ids == (100, 101, 102) and whole.is_last and whole.first_token is FIRST


def test_watch_for_a_request_that_never_comes_is_refused_after_a_while():
    h = Harness()
    h.owner.watch(R, READER)
    h.clock.advance(59)
    assert h.owner.tick() == []
    h.clock.advance(1)
    (refusal,) = refusals(h.owner.tick())
    assert "60 s" in refusal.reason
    # Should it come after all, nobody waits for the lease to expire.
    assert releases(h.chunk(0, 1)) == [R]
    h.finish()


def test_chunks_that_nobody_watches_expire_with_the_lease():
    h = Harness()
    h.chunk(0, 2)
    h.clock.advance(9)
    assert h.chunk(2, 1, is_last=True) == []
    h.clock.advance(9)
    assert h.owner.tick() == []
    h.clock.advance(1)
    assert releases(h.owner.tick()) == [R]
    h.finish()


def test_renewal_keeps_the_lease_and_expiry_tells_the_reader():
    h = Harness()
    h.owner.watch(R, READER)
    (chunk,) = chunks(h.chunk(0, 1))
    for _ in range(5):
        h.clock.advance(9)
        assert h.owner.receive(READER, Renew(chunk.lease_id)) == []
    h.clock.advance(10)
    effects = h.owner.tick()
    assert releases(effects) == [R] and "expired" in refusals(effects)[0].reason
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [False]
    assert releases(h.chunk(1, 1, is_last=True)) == [R]
    h.finish()


def test_broken_stream_keeps_the_lease_and_a_returning_reader_gets_everything_again():
    h = Harness()
    h.owner.watch(R, READER)
    h.chunk(0, 1)
    assert h.owner.reader_gone(READER) == []
    assert chunks(h.chunk(1, 1, is_last=True)) == []
    assert h.owner.num_leases == 1
    (again,) = chunks(h.owner.watch(R, READER))
    assert again.block_ids == (100, 101) and again.is_last
    assert verdicts(h.owner.complete(READER, again.lease_id, EPOCH)) == [True]
    h.finish()


@pytest.mark.parametrize("kind", ["prompt", "prefix", "takeover"])
def test_what_a_dead_reader_leaves_behind_is_reclaimed_in_seconds(kind):
    h = Harness(lease_s=30.0, orphan_s=5.0)
    if kind == "prompt":
        h.owner.watch(R, READER)
        h.chunk(0, 1)
    elif kind == "takeover":
        h.take_over()
        h.chunk(0, 1)
    else:
        (asked,) = [e for e in h.fetch() if isinstance(e, LeasePrefix)]
        h.owner.prefix_leased(READER, asked.request_id, [BlockId(7)])
    h.owner.reader_gone(READER)
    h.clock.advance(3)
    assert h.owner.tick() == []
    if kind != "prefix":
        # Announcements do not keep it alive.
        h.chunk(1, 1)
    h.clock.advance(2)
    assert len(releases(h.owner.tick())) == 1
    assert (h.owner.num_leases, h.owner.num_expired_leases) == (0, 1)
    h.owner.handover_ended(R)
    h.finish()


def test_chunks_that_nobody_has_asked_for_yet_are_no_orphans():
    h = Harness(lease_s=30.0, orphan_s=5.0)
    h.chunk(0, 1, is_last=True)
    h.owner.reader_gone(READER)
    h.clock.advance(20)
    assert h.owner.tick() == [] and h.owner.num_leases == 1
    (whole,) = chunks(h.owner.watch(R, READER))
    h.owner.reader_gone(READER)
    h.clock.advance(4)
    h.owner.watch(R, READER)
    # Back in time: the lease has its full term again.
    h.clock.advance(20)
    assert verdicts(h.owner.complete(READER, whole.lease_id, EPOCH)) == [True]
    h.finish()


def test_broken_stream_forgets_watches_without_chunks():
    h = Harness()
    h.owner.watch(R, READER)
    h.owner.reader_gone(READER)
    h.finish()


def test_verdict_lost_with_the_stream_can_be_asked_for_again():
    h = Harness()
    h.owner.watch(R, READER)
    (chunk,) = chunks(h.chunk(0, 1, is_last=True))
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [True]
    h.owner.reader_gone(READER)
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [True]
    h.finish()


@pytest.mark.parametrize("when", ["watched", "leased", "filled"])
def test_give_up_returns_blocks_now_and_later_chunks_at_once(when):
    h = Harness()
    h.owner.watch(R, READER)
    if when != "watched":
        h.chunk(0, 1, is_last=when == "filled")
    effects = h.owner.receive(READER, GiveUp(R, "cancelled"))
    assert releases(effects) == ([] if when == "watched" else [R])
    if when != "filled":
        first = 0 if when == "watched" else 1
        assert releases(h.chunk(first, 1)) == [R]
        assert releases(h.chunk(first + 1, 1, is_last=True)) == [R]
    h.finish()
    # Nothing of its first life is in the way of a second one.
    h.owner.watch(R, OTHER)
    assert len(chunks(h.chunk(0, 1, is_last=True))) == 1


def test_failed_request_is_refused_and_released():
    h = Harness()
    h.owner.watch(R, READER)
    h.chunk(0, 1)
    effects = h.owner.request_failed(R, "out of memory")
    assert releases(effects) == [R] and refusals(effects)[0].reason == "out of memory"
    h.finish()
    assert h.owner.request_failed(RequestId("unknown"), "cancelled") == []


def test_unwatched_failure_refuses_a_later_watch_once():
    h = Harness()
    h.chunk(0, 1)
    assert releases(h.owner.request_failed(R, "cancelled")) == [R]
    assert [r.reason for r in refusals(h.owner.watch(R, READER))] == ["cancelled"]
    assert h.owner.watch(R, READER) == []


def test_completion_needs_all_chunks_the_right_reader_and_the_right_epoch():
    h = Harness()
    h.owner.watch(R, READER)
    (chunk,) = chunks(h.chunk(0, 1))
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [False]
    h.chunk(1, 1, is_last=True)
    assert verdicts(h.owner.complete(OTHER, chunk.lease_id, EPOCH)) == [False]
    assert verdicts(h.owner.complete(READER, chunk.lease_id, Epoch("e0"))) == [False]
    assert verdicts(h.owner.complete(READER, LeaseId("guess"), EPOCH)) == [False]
    assert h.owner.num_leases == 1
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [True]
    h.finish()


def test_second_reader_is_refused_and_cannot_give_up_for_the_first():
    h = Harness()
    h.owner.watch(R, READER)
    assert len(refusals(h.owner.watch(R, OTHER))) == 1
    h.chunk(0, 1)
    assert h.owner.give_up(OTHER, R, "mine") == []
    assert h.owner.num_leases == 1


def test_gap_in_the_chunks_ends_the_request():
    h = Harness()
    h.owner.watch(R, READER)
    h.chunk(0, 1)
    effects = h.chunk(3, 1)
    assert R in releases(effects) and len(refusals(effects)) == 1
    h.owner.check_integrity()


def test_chunk_of_an_unknown_request_is_given_back():
    h = Harness()
    assert releases(h.chunk(4, 1)) == [R]
    h.finish()


def test_watches_and_memory_of_ended_requests_are_bounded():
    h = Harness(max_watches=3, max_ended=2)
    for i in range(5):
        h.owner.watch(RequestId(f"w{i}"), READER)
    assert h.owner.num_watches == 3
    assert len(refusals(h.owner.watch(RequestId("w9"), READER))) == 1
    for i in range(3):
        h.owner.give_up(READER, RequestId(f"w{i}"), "test")
    h.owner.tick()
    h.owner.check_integrity()
    # The oldest is forgotten, so its first chunk is leased like any other.
    assert releases(h.chunk(0, 1, request_id=RequestId("w0"))) == []
    assert releases(h.chunk(0, 1, request_id=RequestId("w2"))) == [RequestId("w2")]


def test_ended_requests_are_forgotten_in_time():
    h = Harness()
    h.owner.watch(R, READER)
    h.owner.give_up(READER, R, "test")
    h.clock.advance(90)
    h.owner.tick()
    assert releases(h.chunk(0, 1)) == []


class Engine:
    """The lease counts that effects must bring back to zero."""

    def __init__(self) -> None:
        self.leased: Counter[RequestId] = Counter()
        self.num_blocks: dict[RequestId, int] = {}
        self.is_running: dict[RequestId, bool] = {}

    def apply(self, effects: list[OwnerEffect]) -> None:
        for request_id in releases(effects):
            self.leased.pop(request_id, None)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_walk_leaks_nothing(seed):
    rng = random.Random(seed)
    h = Harness(lease_s=5.0, watch_s=8.0, ended_s=12.0, max_watches=20, max_ended=20)
    engine, seen = Engine(), {READER: {}, OTHER: {}}
    number = 0

    def apply(effects):
        engine.apply(effects)
        for effect in effects:
            if isinstance(effect, Send) and isinstance(effect.message, ChunkReady):
                seen[effect.reader][effect.message.lease_id] = effect.message

    def compute(request_id):
        count, is_last = rng.randrange(0, 4), rng.random() < 0.3
        engine.leased[request_id] += 1
        first = engine.num_blocks.get(request_id, 0)
        engine.num_blocks[request_id] = first + count
        engine.is_running[request_id] = not is_last
        fill_id = rng.randrange(3) if is_last else 0
        apply(h.chunk(first, count, is_last=is_last, request_id=request_id, fill_id=fill_id))

    for _ in range(10_000):
        reader = rng.choice([READER, OTHER])
        known = list(engine.is_running)[-8:]
        running = [r for r in known if engine.is_running[r]]
        request_id = rng.choice(known) if known else R
        roll = rng.random()
        if roll < 0.15:
            number += 1
            engine.is_running[RequestId(f"q{number}")] = True
        elif roll < 0.40 and running:
            compute(rng.choice(running))
        elif roll < 0.55:
            apply(h.owner.watch(request_id, reader))
        elif roll < 0.62:
            apply(h.owner.give_up(reader, request_id, "walk"))
        elif roll < 0.66 and request_id in running:
            engine.is_running[request_id] = False
            apply(h.owner.request_failed(request_id, "walk"))
        elif roll < 0.78 and seen[reader]:
            apply(h.owner.complete(reader, rng.choice(list(seen[reader])), EPOCH))
        elif roll < 0.84 and seen[reader]:
            apply(h.owner.renew(reader, rng.choice(list(seen[reader]))))
        elif roll < 0.86:
            apply(h.owner.reader_gone(reader))
        elif roll < 0.90:
            apply(h.owner.receive(reader, LayersRead(request_id, rng.choice([1, 2]))))
        else:
            h.clock.advance(rng.random() * 2)
            apply(h.owner.tick())
        h.owner.check_integrity()
        assert len(engine.leased) == h.owner.num_leases
    h.clock.advance(100)
    apply(h.owner.tick())
    assert not engine.leased
    h.finish()


def test_layers_go_to_the_reader_that_has_all_before_them():
    h = Harness()
    assert h.layers(0, 4) == []
    h.owner.watch(R, READER)
    assert h.layers(0, 4) == [
        Send(READER, LayersReady(R, FILL, 0, tuple(BlockId(100 + i) for i in range(4)), 1))
    ]
    h.chunk(0, 2)
    assert h.layers(0, 4) == h.layers(3, 1) == []
    assert len(h.layers(2, 2)) == 1
    h.owner.reader_gone(READER)
    assert h.layers(2, 2) == []
    h.owner.watch(R, READER)
    h.chunk(2, 2, is_last=True, fill_id=FILL)
    assert h.layers(4, 1) == []
    h.owner.receive(READER, GiveUp(R, "test"))
    assert h.layers(0, 4) == []
    h.finish()


@pytest.mark.parametrize("num_first", [0, 2])
def test_a_reader_that_has_all_layers_is_answered_with_the_last_chunk(num_first):
    h = Harness()
    h.owner.watch(R, READER)
    if num_first:
        h.chunk(0, num_first)
    assert h.owner.receive(READER, LayersRead(R, FILL)) == []
    effects = h.chunk(num_first, 2, is_last=True, fill_id=FILL)
    (chunk,) = chunks(effects)
    assert chunk.fill_id == FILL and verdicts(effects) == [True]
    # Its own question is under way; until then nothing is let go of.
    assert releases(effects) == [] and h.owner.num_leases == 1
    late = h.owner.receive(READER, Complete(chunk.lease_id, EPOCH))
    assert verdicts(late) == [True] and releases(late) == [R]
    h.finish()


def test_a_reader_that_is_done_after_the_last_chunk_is_answered_at_once():
    h = Harness()
    h.owner.watch(R, READER)
    assert verdicts(h.chunk(0, 2, is_last=True, fill_id=FILL)) == []
    assert verdicts(h.owner.receive(READER, LayersRead(R, FILL))) == [True]
    assert releases(h.owner.receive(READER, Complete(h.lease_id(), EPOCH))) == [R]
    h.finish()


@pytest.mark.parametrize(
    ("reader", "fill_id", "filled"),
    [(READER, FILL + 1, FILL), (OTHER, FILL, FILL), (READER, FILL, 0), (READER, 0, 0)],
    ids=["another computation", "another reader", "not told by layers", "none"],
)
def test_what_a_reader_has_not_read_is_not_completed(reader, fill_id, filled):
    h = Harness()
    h.owner.watch(R, READER)
    h.owner.receive(reader, LayersRead(R, fill_id))
    assert verdicts(h.chunk(0, 2, is_last=True, fill_id=filled)) == []
    assert h.owner.num_leases == 1
    complete = h.owner.receive(READER, Complete(h.lease_id(), EPOCH))
    assert verdicts(complete) == [True]
    h.finish()


def test_layers_read_by_a_reader_whose_stream_broke_wait_for_its_return():
    h = Harness()
    h.owner.watch(R, READER)
    h.chunk(0, 1)
    h.owner.receive(READER, LayersRead(R, FILL))
    h.owner.reader_gone(READER)
    assert verdicts(h.chunk(1, 1, is_last=True, fill_id=FILL)) == []
    assert h.owner.num_leases == 1
    assert verdicts(h.owner.receive(READER, Complete(h.lease_id(), EPOCH))) == [True]
    h.finish()


def test_what_one_reader_has_read_says_nothing_of_the_next():
    """The second one reads after the announcement, and must find the blocks as announced."""
    h = Harness()
    h.owner.watch(R, READER)
    h.chunk(0, 1)
    h.owner.receive(READER, LayersRead(R, FILL))
    h.owner.reader_gone(READER)
    h.owner.watch(R, OTHER)
    effects = h.chunk(1, 1, is_last=True, fill_id=FILL)
    assert verdicts(effects) == releases(effects) == []
    assert h.owner.num_leases == 1
    (chunk,) = chunks(effects)
    complete = h.owner.receive(OTHER, Complete(chunk.lease_id, EPOCH))
    assert verdicts(complete) == [True] and releases(complete) == [R]
    h.finish()


def test_an_early_answer_that_is_lost_with_its_chunk_costs_nothing():
    """Both were on a stream that broke; on the next one the reader asks for all of it again."""
    h = Harness()
    h.owner.watch(R, READER)
    h.chunk(0, 1)
    h.owner.receive(READER, LayersRead(R, FILL))
    assert verdicts(h.chunk(1, 1, is_last=True, fill_id=FILL)) == [True]
    h.owner.reader_gone(READER)
    (chunk,) = chunks(h.owner.watch(R, READER))
    assert chunk.is_last and chunk.fill_id == FILL and len(chunk.block_ids) == 2
    assert verdicts(h.owner.receive(READER, Complete(chunk.lease_id, EPOCH))) == [True]
    h.finish()


@pytest.mark.parametrize("is_last", [True, False])
def test_a_reader_that_comes_back_learns_nothing_from_what_another_has_completed(is_last):
    """What it reads from then on is of blocks that may be filled anew."""
    h = Harness()
    h.owner.watch(R, READER)
    (first,) = chunks(h.chunk(0, 2, is_last=is_last))
    h.owner.reader_gone(READER)
    (second,) = chunks(h.owner.watch(R, OTHER))
    assert second.lease_id != first.lease_id and second.block_ids == first.block_ids
    assert h.owner.num_leases == 1
    if not is_last:
        h.chunk(2, 1, is_last=True)
    assert verdicts(h.owner.receive(OTHER, Complete(second.lease_id, EPOCH))) == [True]
    assert verdicts(h.owner.receive(READER, Complete(first.lease_id, EPOCH))) == [False]
    assert verdicts(h.owner.receive(OTHER, Complete(second.lease_id, EPOCH))) == [True]
    h.finish()
