import pytest

from baton.core.block import BlockHash, join_hashes
from baton.core.errors import Unavailable
from baton.core.lifecycle import Timeline
from baton.core.request import FinishReason, RequestId, TokenDelta
from baton.core.worker_info import LoadReport
from baton.rpc.convert import delta_from_wire
from services.worker.config import SessionConfig
from services.worker.kv_events import KvEvent
from services.worker.session import Outbox, RouterSession, Sessions

A, B = RequestId("a"), RequestId("b")


def hashes(*numbers: int) -> list[BlockHash]:
    return [BlockHash(number.to_bytes(16, "big")) for number in numbers]


def test_reader_that_lags_gets_one_joined_delta_per_request():
    outbox = Outbox(SessionConfig())
    outbox.add_delta(TokenDelta(A, 0, [1], num_cached_tokens=4))
    outbox.add_delta(TokenDelta(B, 0, [7]))
    outbox.add_delta(TokenDelta(A, 1, [2]))
    outbox.add_delta(TokenDelta(A, 2, [3], finish_reason=FinishReason.LENGTH, timeline=Timeline()))
    first, second = (delta_from_wire(delta) for delta in outbox.take().deltas)
    assert (first.request_id, first.first_index, first.token_ids) == (A, 0, [1, 2, 3])
    assert first.finish_reason is FinishReason.LENGTH
    assert first.num_cached_tokens == 4
    assert second.token_ids == [7]
    assert outbox.is_empty


def test_joining_leaves_the_engines_deltas_alone():
    outbox = Outbox(SessionConfig())
    delta = TokenDelta(A, 0, [1])
    outbox.add_delta(delta)
    outbox.add_delta(TokenDelta(A, 1, [2]))
    assert delta.token_ids == [1]


def test_deltas_that_do_not_continue_each_other_stay_apart():
    outbox = Outbox(SessionConfig())
    outbox.add_delta(TokenDelta(A, 0, [1], finish_reason=FinishReason.STOP))
    outbox.add_delta(TokenDelta(A, 1, [2]))
    outbox.add_delta(TokenDelta(A, 5, [3]))
    assert [list(delta.token_ids) for delta in outbox.take().deltas] == [[1], [2], [3]]


def test_events_keep_their_numbers_without_gaps():
    outbox = Outbox(SessionConfig())
    outbox.add_event(5, KvEvent(hashes(1)))
    outbox.add_event(6, KvEvent(hashes(2), hashes(1)))
    batch = outbox.take()
    assert batch.first_kv_sequence == 5
    assert len(batch.kv_events) == 2
    outbox.add_event(7, KvEvent([], [], hashes(3), hashes(4)))
    batch = outbox.take()
    assert batch.first_kv_sequence == 7
    (event,) = batch.kv_events
    assert (event.on_host, event.on_disk) == (join_hashes(hashes(3)), join_hashes(hashes(4)))


@pytest.mark.parametrize(
    ("up_to", "first", "left"), [(0, 5, 3), (4, 5, 3), (5, 6, 2), (6, 7, 1), (7, 0, 0), (9, 0, 0)]
)
def test_events_in_the_snapshot_are_not_repeated(up_to, first, left):
    outbox = Outbox(SessionConfig())
    for number in (5, 6, 7):
        outbox.add_event(number, KvEvent(hashes(number)))
    outbox.forget_events(up_to)
    batch = outbox.take()
    assert (batch.first_kv_sequence, len(batch.kv_events)) == (first, left)


def test_only_the_latest_load_is_kept():
    outbox = Outbox(SessionConfig())
    outbox.set_load(LoadReport(num_running=1))
    outbox.set_load(LoadReport(num_running=2))
    assert outbox.take().load.num_running == 2
    assert not outbox.take().HasField("load")


async def test_session_closes_when_too_many_tokens_wait():
    session = RouterSession("r", SessionConfig(max_pending_tokens=10))
    for index in range(20):
        session.send(TokenDelta(A, index, [index]))
    reason = await session.closed()
    assert isinstance(reason, Unavailable)
    assert "limit 10" in str(reason)


async def test_session_closes_when_too_many_hashes_wait():
    sessions, session = Sessions(), RouterSession("r", SessionConfig(max_pending_hashes=10))
    sessions.open(session)
    sessions.broadcast_event(1, KvEvent([], [], hashes(*range(20))))
    sessions.broadcast_load(LoadReport())
    assert session.is_closed


async def test_newer_session_of_a_router_replaces_the_older():
    sessions = Sessions()
    old, other, new = (RouterSession(name, SessionConfig()) for name in ("r", "q", "r"))
    for session in (old, other, new):
        sessions.open(session)
    assert (old.is_closed, other.is_closed, new.is_closed) == (True, False, False)
