"""One move of a running request to another worker, as the router sees it.

    PENDING ── first token or end from the target ──► MOVED     the target generates
       │ ───── target refuses, fails, is lost, late ──► FAILED    the source goes on as before
       └────── the request ends, or is placed anew ───► VOID

The target's messages come here first. Until it has produced something they are news of the move
and not of the request, so a failed move never reaches the client; from then on they pass through.
They are followed on arrival, not when the client gets around to reading: a slow client must not
make a move look stuck.

Pure: time is passed in. Does not know: sessions, who decided and why, how KV is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from baton.core.lifecycle import TransferStats
from baton.core.request import FinishReason, TokenDelta
from baton.core.worker_info import WorkerId
from services.router.requests.mailbox import Arrival, Mailbox


class Trigger(Enum):
    """What makes requests leave a worker."""

    DRAIN = "drain"
    PRESSURE = "pressure"


class HandoverState(Enum):
    PENDING = "pending"
    MOVED = "moved"
    FAILED = "failed"
    VOID = "void"


@dataclass(slots=True, eq=False)
class Handover:
    """Takes the place of the request's mailbox in the target's session."""

    source: WorkerId
    target: WorkerId
    trigger: Trigger
    started_at_s: float
    """Event-loop time."""
    mailbox: Mailbox
    unfinished: set[WorkerId]
    """The attempt's: workers whose last delta its reader has not seen."""
    on_settled: Callable[[Handover], None]
    """Called once, when the state leaves PENDING."""
    state: HandoverState = HandoverState.PENDING
    failure: str = ""
    settled_at_s: float = 0.0
    pause_s: float | None = None
    """From the client's view: between the last token of the source and the first of the target."""
    transfer: TransferStats = field(default_factory=TransferStats)
    """What reading the KV cost the target."""

    @property
    def is_pending(self) -> bool:
        return self.state is HandoverState.PENDING

    @property
    def has_moved(self) -> bool:
        return self.state is HandoverState.MOVED

    @property
    def seconds(self) -> float:
        return self.settled_at_s - self.started_at_s

    def put(self, arrival: Arrival, now_s: float) -> None:
        """A message of the target. `now_s` is event-loop time."""
        if self.is_pending:
            failure = _failure(arrival)
            if failure is not None:
                self._fail(failure, arrival, now_s)
                return
            if arrival.delta is None or not _is_output(arrival.delta):
                return
            self._settle(HandoverState.MOVED, now_s)
        if self.has_moved:
            self.mailbox.put(arrival, now_s)

    def void(self, now_s: float) -> None:
        """The request needs no worker any more, or has been placed anew."""
        if self.is_pending:
            self._settle(HandoverState.VOID, now_s)

    def _fail(self, failure: str, arrival: Arrival, now_s: float) -> None:
        self.failure = failure
        if self.source in self.unfinished:
            self.unfinished.discard(self.target)
            # The source may have stood still for this move; its time to answer starts again.
            self.mailbox.last_put_at_s = max(self.mailbox.last_put_at_s, now_s)
        else:
            # The source has handed the request on and cannot take it back.
            self.mailbox.put(arrival, now_s)
        self._settle(HandoverState.FAILED, now_s)

    def _settle(self, state: HandoverState, now_s: float) -> None:
        self.state, self.settled_at_s = state, now_s
        self.on_settled(self)


def _failure(arrival: Arrival) -> str | None:
    delta = arrival.delta
    if delta is None:
        return arrival.lost
    if delta.finish_reason is FinishReason.ERROR:
        return delta.error or "unnamed error"
    if delta.finish_reason is FinishReason.CANCELLED:
        return "the worker ended the request"
    return None


def _is_output(delta: TokenDelta) -> bool:
    return bool(delta.token_ids) or delta.finish_reason is not None
