"""LeaseOwner and requests that other workers take over."""

from __future__ import annotations

import pytest

from baton.core.request import RequestId
from baton.core.worker_info import Epoch
from kvtransfer.messages import Complete, Freeze, GiveUp, LeaseId, Renew, Takeover, Watch
from kvtransfer.owner import (
    FinishHandover,
    FreezeRequest,
    OwnerEffect,
    ReleaseLease,
    ResumeRequest,
    StartHandover,
)
from owner_harness import (
    EPOCH,
    FIRST,
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


def resumes(effects: list[OwnerEffect]) -> list[RequestId]:
    return [effect.request_id for effect in only(effects, ResumeRequest)]


def brought_to(h: Harness, state: str) -> None:
    """A takeover by READER in a state of its life."""
    h.take_over()
    if state == "asked":
        return
    h.chunk(0, 2)
    if state == "leased":
        return
    h.owner.receive(READER, Freeze(R))
    if state == "frozen":
        h.chunk(2, 1, is_last=True)


STATES = ["asked", "leased", "freezing", "frozen"]


def test_takeover_is_started_frozen_and_finished():
    h = Harness()
    assert h.take_over() == [StartHandover(R, 3)]
    (first,) = chunks(h.chunk(0, 2))
    assert h.owner.receive(READER, Freeze(R)) == [FreezeRequest(R)]
    (more,) = chunks(h.chunk(2, 1))
    (last,) = chunks(h.chunk(3, 1, is_last=True))
    assert first.lease_id == more.lease_id == last.lease_id
    assert not more.is_last and last.is_last and last.first_token is FIRST
    effects = h.owner.receive(READER, Complete(last.lease_id, EPOCH))
    assert verdicts(effects) == [True]
    assert effects[1:] == [ReleaseLease(R, "completed"), FinishHandover(R)]
    h.finish()
    # Asked again, because the answer was lost with the stream.
    assert verdicts(h.owner.complete(READER, last.lease_id, EPOCH)) == [True]
    h.finish()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "end", ["gives up", "expires", "gap", "restarts from another token", "not wanted"]
)
def test_every_other_end_resumes_exactly_once_after_the_release(state, end):
    h = Harness(frozen_s=1000.0, takeover_s=11.0)
    brought_to(h, state)
    if end == "gives up":
        effects = h.owner.receive(READER, GiveUp(R, "no room"))
    elif end == "expires":
        h.clock.advance(11)
        effects = h.owner.tick()
    elif end == "gap":
        effects = h.chunk(7, 1)
    elif end == "not wanted":
        effects = h.owner.request_failed(R, "cancelled")
    else:
        effects = h.take_over(num_known_tokens=4)
    assert resumes(effects) == [R]
    # Also before the first chunk: the engine may have leased it, and not be heard yet.
    order = [type(e) for e in effects if isinstance(e, (ReleaseLease, ResumeRequest))]
    assert ReleaseLease in order and order[-1] is ResumeRequest
    again = [
        *h.owner.receive(READER, GiveUp(R, "again")),
        *h.owner.handover_failed(R, "too late"),
        *h.chunk(3, 1),
        *h.owner.tick(),
    ]
    assert resumes(again) == []
    # What came after the end is given back.
    assert releases(again) == [R]
    h.owner.handover_ended(R)
    h.finish()
    assert only(h.take_over(reader=OTHER), StartHandover)


def test_chunks_of_an_ended_takeover_cannot_pass_for_the_next_one():
    h = Harness()
    h.take_over()
    assert resumes(h.owner.receive(READER, GiveUp(R, "no room"))) == [R]
    (refusal,) = refusals(h.take_over(reader=OTHER))
    assert "no room" in refusal.reason
    # It was on its way when the engine learned of the end.
    assert releases(h.chunk(0, 2)) == [R]
    h.owner.handover_ended(R)
    assert h.take_over(reader=OTHER) == [StartHandover(R, 3)]
    assert len(chunks(h.chunk(0, 2))) == 1
    h.owner.check_integrity()


def test_engine_that_is_slow_to_resume_is_waited_for_however_long_it_takes():
    h = Harness(ended_s=5.0)
    h.take_over()
    h.owner.receive(READER, GiveUp(R, "no room"))
    h.clock.advance(1000)
    assert h.owner.tick() == []
    assert releases(h.chunk(0, 2)) == [R] and h.owner.num_leases == 0
    h.owner.handover_ended(R)
    h.finish()
    assert only(h.take_over(), StartHandover)


@pytest.mark.parametrize("state", STATES[:2])
def test_reconnected_reader_gets_everything_again(state):
    h = Harness()
    brought_to(h, state)
    h.owner.reader_gone(READER)
    effects = h.take_over()
    assert not only(effects, StartHandover) and not resumes(effects)
    (whole,) = chunks(h.chunk(0, 2) if state == "asked" else effects)
    assert whole.first_block_index == 0
    assert len(whole.block_ids) == 2 and not whole.is_last
    frozen = h.owner.receive(READER, Freeze(R))
    assert only(frozen, FreezeRequest) == [FreezeRequest(R)]


@pytest.mark.parametrize("state", STATES[2:])
def test_request_that_stands_still_resumes_as_soon_as_its_readers_stream_breaks(state):
    h = Harness()
    brought_to(h, state)
    (lease,) = h.owner._table.leases._leases
    effects = h.owner.reader_gone(READER)
    assert resumes(effects) == [R] and releases(effects) == [R]
    h.owner.handover_ended(R)
    # The reader comes back. Whatever it has read by then, the request is not its own.
    assert verdicts(h.owner.complete(READER, lease, EPOCH)) == [False]
    (refusal,) = refusals(h.take_over())
    assert "stream broke" in refusal.reason
    h.finish()
    assert only(h.take_over(), StartHandover)


def test_stream_that_breaks_after_the_completion_takes_nothing_back():
    h = Harness()
    brought_to(h, "frozen")
    (lease,) = h.owner._table.leases._leases
    assert only(h.owner.complete(READER, lease, EPOCH), FinishHandover)
    assert h.owner.reader_gone(READER) == []
    assert verdicts(h.owner.complete(READER, lease, EPOCH)) == [True]
    h.finish()


@pytest.mark.parametrize("state", STATES)
def test_another_reader_is_refused_even_while_the_first_is_away(state):
    h = Harness()
    brought_to(h, state)
    for _ in range(2):
        assert len(refusals(h.take_over(reader=OTHER))) == 1
        assert len(refusals(h.owner.receive(OTHER, Freeze(R)))) == 1
        assert h.owner.receive(OTHER, GiveUp(R, "mine")) == []
        assert len(refusals(h.owner.watch(R, OTHER))) == 1
        if state in STATES[:2]:
            h.owner.reader_gone(READER)
    assert h.owner.num_takeovers == 1
    h.owner.check_integrity()


def test_refusal_of_the_engine_reaches_the_reader_and_resumes_nothing():
    h = Harness()
    h.take_over()
    effects = h.owner.handover_failed(R, "no such request")
    assert [r.reason for r in refusals(effects)] == ["no such request"]
    assert resumes(effects) == [] and releases(effects) == []
    h.finish()


def test_refused_freeze_takes_the_handover_back():
    h = Harness()
    brought_to(h, "freezing")
    effects = h.owner.handover_failed(R, "preempted")
    assert resumes(effects) == [R] and releases(effects) == [R] and len(refusals(effects)) == 1


@pytest.mark.parametrize("state", STATES)
def test_sequence_that_ends_by_itself_is_refused_and_not_resumed(state):
    h = Harness()
    brought_to(h, state)
    effects = h.owner.request_ended(R, "it has ended")
    assert [r.reason for r in refusals(effects)] == ["it has ended"]
    assert resumes(effects) == []
    assert releases(effects) == ([] if state == "asked" else [R])
    h.finish()


def test_end_of_a_sequence_leaves_the_lease_of_its_prompt_alone():
    h = Harness()
    h.owner.watch(R, READER)
    (chunk,) = chunks(h.chunk(0, 1, is_last=True))
    assert h.owner.request_ended(R, "it has ended") == []
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [True]


def test_frozen_request_resumes_soon_when_its_reader_is_silent():
    h = Harness(frozen_s=2.0)
    brought_to(h, "frozen")
    h.clock.advance(1.9)
    assert h.owner.tick() == []
    h.clock.advance(0.1)
    effects = h.owner.tick()
    assert resumes(effects) == [R] and releases(effects) == [R]
    (refusal,) = refusals(effects)
    assert "stood still for 2 s" in refusal.reason
    h.owner.handover_ended(R)
    assert only(h.take_over(), StartHandover)


def test_takeover_has_a_time_limit_however_often_it_is_renewed():
    h = Harness(takeover_s=30.0)
    h.take_over()
    (chunk,) = chunks(h.chunk(0, 1))
    for _ in range(4):
        h.clock.advance(7)
        assert h.owner.receive(READER, Renew(chunk.lease_id)) == []
    h.clock.advance(2)
    assert resumes(h.owner.tick()) == [R]
    assert h.owner.num_expired_leases == 0


def test_prompt_blocks_are_not_held_for_ever():
    h = Harness(held_s=30.0)
    h.owner.watch(R, READER)
    (chunk,) = chunks(h.chunk(0, 1, is_last=True))
    for _ in range(4):
        h.clock.advance(7)
        assert h.owner.receive(READER, Renew(chunk.lease_id)) == []
    h.clock.advance(2)
    effects = h.owner.tick()
    assert releases(effects) == [R] and "held for 30 s" in refusals(effects)[0].reason
    h.finish()


def test_forged_and_outdated_questions_change_nothing():
    h = Harness()
    brought_to(h, "frozen")
    for reader in (READER, OTHER):
        assert verdicts(h.owner.complete(reader, LeaseId("guess"), EPOCH)) == [False]
        assert h.owner.receive(reader, Renew(LeaseId("guess"))) == []
        unknown = RequestId("unknown")
        assert len(refusals(h.owner.receive(reader, Freeze(unknown)))) == 1
        assert h.owner.receive(reader, GiveUp(unknown, "?")) == []
    (chunk,) = chunks(h.take_over())
    assert verdicts(h.owner.complete(READER, chunk.lease_id, Epoch("e0"))) == [False]
    assert verdicts(h.owner.complete(OTHER, chunk.lease_id, EPOCH)) == [False]
    assert verdicts(h.owner.complete(READER, chunk.lease_id, EPOCH)) == [True]


def test_completion_before_the_freeze_is_not_valid():
    h = Harness()
    h.take_over()
    (chunk,) = chunks(h.chunk(0, 1))
    effects = h.owner.complete(READER, chunk.lease_id, EPOCH)
    assert verdicts(effects) == [False] and not only(effects, FinishHandover)
    assert h.owner.num_takeovers == 1


def test_prompt_and_takeover_of_one_request_exclude_each_other():
    h = Harness()
    h.owner.watch(R, READER)
    assert "as prompt, not as takeover" in refusals(h.take_over())[0].reason
    h.owner.request_failed(R, "test")
    h.take_over()
    assert "as takeover, not as prompt" in refusals(h.owner.receive(READER, Watch(R)))[0].reason


def test_late_prompt_of_an_ended_watch_does_not_stand_in_the_way():
    h = Harness()
    h.owner.watch(R, READER)
    h.owner.receive(READER, GiveUp(R, "no room"))
    assert only(h.take_over(), StartHandover)


def test_takeovers_are_bounded():
    h = Harness(max_takeovers=2)
    for name in ("a", "b"):
        h.owner.receive(READER, Takeover(RequestId(name), 0))
    (refusal,) = refusals(h.take_over())
    assert "2 requests are being taken over" in refusal.reason
    h.owner.receive(READER, GiveUp(RequestId("a"), "x"))
    assert only(h.take_over(), StartHandover)
    h.owner.check_integrity()
