from __future__ import annotations

import pytest

from baton.core.lifecycle import EngineUse, Timeline, TransferStats
from baton.core.lifecycle import LifecycleEvent as Event


def test_first_time_of_an_event_counts():
    timeline = Timeline()
    timeline.record(Event.PREFILL_STARTED, 1.0)
    timeline.record(Event.PREFILL_STARTED, 5.0)
    assert timeline.points == {Event.PREFILL_STARTED: 1.0}


def test_duration_needs_both_points_and_is_never_negative():
    timeline = Timeline({Event.ARRIVED: 2.0, Event.FIRST_TOKEN: 2.5, Event.PLACED: 1.0})
    assert timeline.seconds(Event.ARRIVED, Event.FIRST_TOKEN) == 0.5
    assert timeline.seconds(Event.ARRIVED, Event.LAST_TOKEN) is None
    assert timeline.seconds(Event.ARRIVED, Event.PLACED) == 0.0


def test_merge_keeps_own_points_and_takes_the_measured_transfer():
    mine = Timeline({Event.ARRIVED: 1.0})
    mine.merge(Timeline({Event.ARRIVED: 9.0, Event.PREFILL_ENDED: 2.0}))
    stats = TransferStats(num_bytes=10, num_blocks=1, num_reads=1, seconds=0.5)
    mine.merge(Timeline({Event.DECODE_ENDED: 3.0}, stats))
    mine.merge(Timeline({Event.DECODE_STARTED: 2.5}))
    assert mine.points == {
        Event.ARRIVED: 1.0,
        Event.PREFILL_ENDED: 2.0,
        Event.DECODE_ENDED: 3.0,
        Event.DECODE_STARTED: 2.5,
    }
    assert mine.transfer is stats


def test_engine_time_of_another_process_is_not_taken_over():
    mine = Timeline(engine=EngineUse(1.0, 3))
    mine.merge(Timeline(engine=EngineUse(5.0, 7)))
    assert mine.engine == EngineUse(1.0, 3)


@pytest.mark.parametrize(
    ("num_reads", "seconds", "exposed_s", "share"),
    [
        (1, 2.0, 0.5, 0.75),
        (3, 2.0, 0.0, 1.0),
        (1, 2.0, 2.5, 0.0),
        (0, 2.0, 0.5, None),
        (1, 0.0, 0.0, None),
    ],
)
def test_hidden_share_is_what_the_exposed_part_leaves(num_reads, seconds, exposed_s, share):
    assert TransferStats(1, 1, num_reads, seconds, exposed_s).hidden_share == share


def test_wire_numbers_never_change():
    assert {e.name: int(e) for e in Event} == {
        "ARRIVED": 1,
        "PLACED": 2,
        "FIRST_TOKEN": 3,
        "LAST_TOKEN": 4,
        "PREFILL_QUEUED": 10,
        "PREFILL_STARTED": 11,
        "PREFILL_ENDED": 12,
        "DECODE_RESERVED": 20,
        "TRANSFER_STARTED": 21,
        "TRANSFER_ENDED": 22,
        "DECODE_STARTED": 23,
        "DECODE_ENDED": 24,
    }
