"""When what happened to a sequence, in its timeline.

    PREFILL, GENERATE    queued ─► started ─► first token ─► [DECODE_STARTED] ─► ended
    DECODE, TAKEOVER     reserved ─► started ─► ended

Not known here: blocks, deltas.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.core.clock import Clock
from baton.core.lifecycle import LifecycleEvent
from baton.core.request import Work
from baton.engine.sequence import Sequence


class SequenceTimes:
    def __init__(self, clock: Clock) -> None:
        """`clock` gives wall-clock seconds."""
        self._clock = clock

    def queued(self, sequence: Sequence) -> None:
        if not sequence.work.reads_all_kv:
            sequence.timeline.record(LifecycleEvent.PREFILL_QUEUED, self._clock.now())

    def scheduled(self, started: Iterable[Sequence], reserved: Iterable[Sequence]) -> None:
        """A step computes some for the first time, and holds blocks for others from now on."""
        if not started and not reserved:
            return
        now_s = self._clock.now()
        for sequence in started:
            is_read = sequence.work.reads_all_kv
            event = LifecycleEvent.DECODE_STARTED if is_read else LifecycleEvent.PREFILL_STARTED
            sequence.timeline.record(event, now_s)
        for sequence in reserved:
            sequence.timeline.record(LifecycleEvent.DECODE_RESERVED, now_s)

    def first_token(self, sequence: Sequence) -> None:
        """The first that is sampled here."""
        if sequence.work.reads_all_kv:
            return
        now_s = self._clock.now()
        sequence.timeline.record(LifecycleEvent.PREFILL_ENDED, now_s)
        if sequence.work is Work.GENERATE:
            sequence.timeline.record(LifecycleEvent.DECODE_STARTED, now_s)

    def ended(self, sequence: Sequence) -> None:
        if LifecycleEvent.DECODE_STARTED in sequence.timeline.points:
            sequence.timeline.record(LifecycleEvent.DECODE_ENDED, self._clock.now())
