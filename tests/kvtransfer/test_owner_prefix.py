"""LeaseOwner and prefixes that readers fetch from its cache."""

from __future__ import annotations

import pytest

from baton.core.block import BlockId
from baton.core.request import RequestId
from kvtransfer.messages import Complete, FetchPrefix, GiveUp, Watch
from kvtransfer.owner import LeasePrefix
from owner_harness import (
    EPOCH,
    HASHES,
    OTHER,
    READER,
    Harness,
    R,
    chunks,
    only,
    refusals,
    releases,
    verdicts,
)

BLOCKS = (BlockId(7), BlockId(8))


def asked(h: Harness) -> LeasePrefix:
    """A fetch whose question is with the engine."""
    (question,) = h.fetch()
    assert isinstance(question, LeasePrefix)
    return question


def answer(h: Harness, question: LeasePrefix, blocks: tuple[BlockId, ...] = BLOCKS):
    return h.owner.prefix_leased(question.reader, question.request_id, blocks)


def test_cached_blocks_are_leased_announced_and_released():
    h = Harness()
    question = asked(h)
    assert question.reader == READER and question.block_hashes == HASHES
    (chunk,) = chunks(answer(h, question))
    assert (chunk.request_id, chunk.block_ids) == (R, BLOCKS)
    assert chunk.is_last and chunk.first_token is None and chunk.first_block_index == 0
    effects = h.owner.receive(READER, Complete(chunk.lease_id, EPOCH))
    assert verdicts(effects) == [True] and releases(effects) == [question.request_id]
    h.finish()


def test_nothing_cached_is_refused():
    h = Harness()
    (refusal,) = refusals(answer(h, asked(h), ()))
    assert refusal.request_id == R and "none of these blocks is cached" in refusal.reason
    h.finish()


def test_no_hashes_are_refused_without_asking_the_engine():
    h = Harness()
    (effect,) = h.owner.receive(READER, FetchPrefix(R, ()))
    assert refusals([effect])
    h.finish()


def test_names_of_two_readers_and_of_requests_are_apart():
    h = Harness()
    mine = asked(h)
    (theirs,) = only(h.fetch(reader=OTHER), LeasePrefix)
    h.owner.receive(OTHER, Watch(R))
    (prompt,) = chunks(h.chunk(0, 1, is_last=True))
    assert len({mine.request_id, theirs.request_id, R}) == 3
    (my_chunk,), (their_chunk,) = chunks(answer(h, mine)), chunks(answer(h, theirs, (BlockId(9),)))
    assert my_chunk.request_id == their_chunk.request_id == prompt.request_id == R
    for reader, lease_id in (
        (READER, my_chunk.lease_id),
        (OTHER, their_chunk.lease_id),
        (OTHER, prompt.lease_id),
    ):
        assert verdicts(h.owner.complete(reader, lease_id, EPOCH)) == [True]
    h.finish()


@pytest.mark.parametrize("is_away", [False, True])
def test_question_repeated_after_a_broken_stream_asks_the_engine_once(is_away):
    h = Harness()
    question = asked(h)
    h.owner.reader_gone(READER)
    if is_away:
        assert answer(h, question) == []
        (chunk,) = chunks(h.fetch())
    else:
        assert h.fetch() == []
        (chunk,) = chunks(answer(h, question))
    assert chunk.block_ids == BLOCKS
    (again,) = chunks(h.fetch())
    assert again == chunk
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [True]
    h.finish()


def test_given_up_before_the_answer_gives_the_lease_back_when_it_comes():
    h = Harness()
    question = asked(h)
    assert h.owner.receive(READER, GiveUp(R, "cancelled")) == []
    assert len(refusals(h.fetch())) == 1
    assert releases(answer(h, question)) == [question.request_id]
    h.finish()
    # The name can be used again.
    assert len(only(h.fetch(), LeasePrefix)) == 1


def test_given_up_after_the_answer_gives_the_lease_back_now():
    h = Harness()
    question = asked(h)
    answer(h, question)
    assert releases(h.owner.receive(READER, GiveUp(R, "x"))) == [question.request_id]
    h.finish()


def test_unrenewed_prefix_expires():
    h = Harness()
    question = asked(h)
    answer(h, question)
    h.clock.advance(10)
    effects = h.owner.tick()
    assert releases(effects) == [question.request_id] and len(refusals(effects)) == 1
    assert h.owner.num_expired_leases == 1
    h.finish()


def test_engine_that_never_answers_is_waited_for_in_bounds():
    h = Harness()
    question = asked(h)
    h.clock.advance(60)
    assert len(refusals(h.owner.tick())) == 1
    assert releases(answer(h, question)) == [question.request_id]
    h.finish()


def test_answer_that_nobody_asked_for_is_given_back():
    h = Harness()
    stray = RequestId("stray")
    assert releases(h.owner.prefix_leased(READER, stray, BLOCKS)) == [stray]
    h.finish()


def test_fetches_are_bounded():
    h = Harness(max_prefix_fetches=2)
    for name in ("a", "b"):
        assert only(h.fetch(request_id=RequestId(name)), LeasePrefix)
    (refusal,) = refusals(h.fetch(request_id=RequestId("c")))
    assert "2 prefixes" in refusal.reason
    h.owner.check_integrity()
