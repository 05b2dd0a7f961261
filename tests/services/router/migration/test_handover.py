"""The states of a move, by what the target says; the source's word counts elsewhere."""

from __future__ import annotations

import random

import pytest

from baton.core.request import FinishReason, TokenDelta
from services.router.migration.handover import Handover, HandoverState, Trigger
from services.router.requests.mailbox import Arrival, Mailbox

ERROR = TokenDelta("r", finish_reason=FinishReason.ERROR, error="no room", is_retryable=True)
CANCELLED = TokenDelta("r", finish_reason=FinishReason.CANCELLED)


def handover(*, source_is_done=False):
    settled = []
    unfinished = {"d1"} if source_is_done else {"d0", "d1"}
    mailbox = Mailbox(64, now_s=1.0)
    move = Handover("d0", "d1", Trigger.DRAIN, 1.0, mailbox, unfinished, settled.append)
    return move, settled


def say(move, delta=None, *, lost="", now_s=3.0):
    move.put(Arrival("d1", 0.0, delta, lost), now_s)


def token(index):
    return TokenDelta("r", index, [65 + index])


def test_first_token_settles_the_move_and_passes_through():
    move, settled = handover()
    say(move, token(4))
    say(move, token(5), now_s=4.0)
    assert move.has_moved and settled == [move] and move.seconds == 2.0
    assert [a.delta.first_index for a in move.mailbox.unread] == [4, 5]


def test_end_without_a_token_settles_it_as_well():
    move, _ = handover()
    say(move, TokenDelta("r", 4, finish_reason=FinishReason.STOP))
    assert move.has_moved and len(move.mailbox.unread) == 1


def test_word_without_output_settles_nothing():
    move, settled = handover()
    say(move, TokenDelta("r", num_cached_tokens=16))
    assert move.is_pending and not settled and not move.mailbox.unread


@pytest.mark.parametrize(
    ("delta", "lost", "failure"),
    [
        (ERROR, "", "no room"),
        (CANCELLED, "", "the worker ended the request"),
        (None, "gone", "gone"),
    ],
)
def test_failure_stays_between_the_workers(delta, lost, failure):
    move, settled = handover()
    say(move, delta, lost=lost, now_s=9.0)
    assert move.state is HandoverState.FAILED and move.failure == failure and settled == [move]
    assert not move.mailbox.unread
    assert move.unfinished == {"d0"}
    assert move.mailbox.last_put_at_s == 9.0, "the source's time to answer starts again"
    say(move, token(4))
    assert not move.mailbox.unread, "a late word of a failed move"


@pytest.mark.parametrize(("delta", "lost"), [(ERROR, ""), (None, "gone")])
def test_failure_after_the_source_has_let_go_is_the_requests(delta, lost):
    move, _ = handover(source_is_done=True)
    say(move, delta, lost=lost)
    assert move.state is HandoverState.FAILED
    assert len(move.mailbox.unread) == 1 and move.unfinished == {"d1"}


@pytest.mark.parametrize(("delta", "lost"), [(ERROR, ""), (None, "gone")])
def test_failure_after_the_move_is_the_requests(delta, lost):
    move, settled = handover()
    say(move, token(4))
    say(move, delta, lost=lost)
    assert move.has_moved and len(move.mailbox.unread) == 2 and len(settled) == 1


def test_void_move_hears_nothing_more():
    move, settled = handover()
    move.void(2.0)
    for delta in (token(4), ERROR):
        say(move, delta)
    move.void(3.0)
    assert move.state is HandoverState.VOID and settled == [move]
    assert not move.mailbox.unread and move.failure == ""


def test_random_walk_settles_once_and_forwards_only_what_belongs_to_the_request():
    rng = random.Random(1)
    for _ in range(2000):
        is_done = rng.random() < 0.3
        move, settled = handover(source_is_done=is_done)
        for index in range(6):
            before, was = len(move.mailbox.unread), move.state
            what = rng.choice(("token", "token", "error", "lost", "void"))
            if what == "token":
                say(move, token(index))
            elif what == "error":
                say(move, ERROR)
            elif what == "lost":
                say(move, lost="gone")
            else:
                move.void(3.0)
            grew = len(move.mailbox.unread) > before
            if was is HandoverState.MOVED:
                assert grew == (what != "void") and move.state is was
            elif was is HandoverState.PENDING:
                is_failure = what in ("error", "lost")
                assert grew == (what == "token" or (is_failure and is_done))
            else:
                assert not grew and move.state is was
            assert len(settled) == (not move.is_pending)
