"""The requests a worker is serving, from Submit to the last delta.

Every request belongs to the session that submitted it and ends exactly once towards it: by its
own last token, by cancel, by its deadline, by an error of engine or transfer, or silently when
the session breaks. After that the record stays until the engine has let go too, so that an id is
never in two lives at once.

    submit ──► held until its prefix has come ──► in the engine ──► last delta
       ├─────────────────────────────────────────────►│
       └──► expected by the reading side, in the engine, reserved ──► arrived ──► last delta

Runs on the event loop; knows the engine through its loop and transfers through their two sides.
Not known here: gRPC streams, protobuf beyond Submit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.core.block import BlockId
from baton.core.errors import InvalidRequest, RequestError, Unavailable
from baton.core.lifecycle import Timeline
from baton.core.request import FinishReason, GenerateRequest, RequestId, TokenDelta, Work
from baton.core.worker_info import LoadReport
from baton.engine.engine import Reservation
from baton.rpc.convert import request_from_wire
from baton.rpc.v1 import worker_pb2 as pb
from services.worker.engine_api import StepResult
from services.worker.engine_loop import EngineLoop
from services.worker.last_delta import error_delta, handed_back, is_last, refusal
from services.worker.request_sides import HoldSide, LeaseSide, ReadSide, SaveSide
from services.worker.role_state import RoleMachine
from services.worker.session import RouterSession, Sessions

logger = logging.getLogger(__name__)

_UNFINISHED = (FinishReason.CANCELLED, FinishReason.ERROR)


@dataclass(slots=True, eq=False)
class _Record:
    request: GenerateRequest
    session: RouterSession | None
    """None once the request has ended towards its router."""
    owner: RouterSession
    """Whose request it is, also then."""
    deadline: asyncio.TimerHandle
    is_reserved: bool = False
    """Where all KV is read: from the reservation until its blocks are activated or abandoned."""
    is_held: bool = False
    """The engine does not know of it yet."""


class Requests:
    """Bookkeeping of live requests."""

    def __init__(self, sessions: Sessions, roles: RoleMachine) -> None:
        """`roles` says whether work is taken, and for which role."""
        self._sessions = sessions
        self._roles = roles
        self._live: dict[RequestId, _Record] = {}
        self._is_unhealthy = False
        self._load = LoadReport()

    def attach(
        self,
        engine: EngineLoop,
        leases: LeaseSide,
        reads: ReadSide,
        holds: HoldSide,
        saves: SaveSide | None = None,
    ) -> None:
        """Close the circle: engine and transfers call back into this object."""
        self._engine = engine
        self._leases = leases
        self._reads = reads
        self._holds = holds
        self._saves = saves

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def is_draining(self) -> bool:
        """No new work is taken, for good or until the worker has another role."""
        return not self._roles.takes_work

    @property
    def load(self) -> LoadReport:
        """As of the last step."""
        return self.with_flags(self._load)

    def with_flags(self, load: LoadReport) -> LoadReport:
        """An engine's load and what the engine does not know of the worker."""
        return dataclasses.replace(
            load,
            num_waiting=load.num_waiting + self._holds.num_held,
            queued_prefill_tokens=load.queued_prefill_tokens + self._holds.num_held_tokens,
            is_draining=self.is_draining,
            is_unhealthy=load.is_unhealthy or self._is_unhealthy,
        )

    def start_draining(self) -> None:
        """Take no work from now on, for good, and tell the routers."""
        self._roles.end()
        self.repeat_load()

    def repeat_load(self) -> None:
        """Tell the routers the last known load again: an idle worker is still there."""
        self._sessions.broadcast_load(self.load)

    def set_unhealthy(self, is_unhealthy: bool) -> None:
        """Tell the routers when the verdict on this worker changes."""
        if is_unhealthy != self._is_unhealthy:
            self._is_unhealthy = is_unhealthy
            self.repeat_load()

    # From routers.

    def submit(self, session: RouterSession, message: pb.Submit) -> None:
        """Take a request, or answer its session with an error delta."""
        request_id = RequestId(message.request_id)
        try:
            request = self._checked(message)
            if reason := self._reason_to_hand_back(message.role_version):
                session.send(handed_back(request_id, reason))
                return
        except (RequestError, Unavailable) as error:
            session.send(refusal(request_id, error))
            return
        except ValueError as error:
            session.send(refusal(request_id, InvalidRequest(str(error))))
            return
        deadline = asyncio.get_running_loop().call_later(
            request.deadline_s, self._deadline_passed, request_id
        )
        record = self._live[request_id] = _Record(request, session, session, deadline)
        if request.work.reads_all_kv:
            self._reads.expect(request)
        elif self._holds.hold(request):
            record.is_held = True
            self.repeat_load()
            return
        self._engine.submit(request)

    def cancel(self, session: RouterSession, request_id: RequestId, reason: str) -> None:
        """The router no longer wants the request; it gets one delta CANCELLED if still live."""
        record = self._live.get(request_id)
        if record is None:
            # A prefill may have been handed on: then only its lease is left to give up.
            self._leases.withdraw(request_id, f"cancelled: {reason}")
        elif record.session is session:
            logger.debug("request %s cancelled by its router: %s", request_id, reason)
            self._stop(record, TokenDelta(request_id, finish_reason=FinishReason.CANCELLED))

    def session_ended(self, session: RouterSession) -> None:
        """The router is gone: nobody is left to read its requests' tokens."""
        for record in list(self._live.values()):
            if record.session is session:
                self._stop(record, None)

    def end_all(self, message: str) -> int:
        """Hand every live request back to its router; returns their number."""
        return self.hand_back(tuple(self._live), message)

    def hand_back_waiting(self, in_engine: Iterable[RequestId], message: str) -> int:
        """Hand back what has not begun: those `in_engine` that wait, and those held before it."""
        held = [request_id for request_id, record in self._live.items() if record.is_held]
        return self.hand_back((*in_engine, *held), message)

    def hand_back_reserved(self, message: str) -> int:
        """Hand back what holds blocks and has yet to read its KV into them."""
        reserved = [request_id for request_id, r in self._live.items() if r.is_reserved]
        return self.hand_back(reserved, message)

    def hand_back(self, request_ids: Iterable[RequestId], message: str) -> int:
        """End requests here, to be placed anew; returns how many were still live."""
        num_ended = 0
        for request_id in request_ids:
            record = self._live.get(request_id)
            if record is not None and record.session is not None:
                num_ended += 1
                self._stop(record, handed_back(request_id, message))
        return num_ended

    # From the engine.

    def on_step(self, result: StepResult) -> None:
        """Distribute one step's outcome."""
        output = result.output
        # Before the deltas: the end of a request that nobody wants takes its lease with it.
        for chunk in output.chunks:
            self._leases.announce(chunk)
        for request_id in output.handovers_ended:
            self._leases.handover_over(request_id)
        for delta in output.deltas:
            self._deliver(delta)
        for reservation in output.reservations:
            self._reserved(reservation)
        if result.kv_event is not None:
            self._holds.cache_changed(output.stored, output.removed)
            self._sessions.broadcast_event(result.kv_sequence, result.kv_event)
        self._load = result.load
        if self._saves is not None:
            self._saves.on_load(result.load)
        self._sessions.broadcast_load(self.load)

    # From the holding side.

    def released(self, request_id: RequestId) -> None:
        """A held request has waited enough."""
        record = self._live.get(request_id)
        if record is not None and record.is_held:
            record.is_held = False
            self._engine.submit(record.request)

    # From the reading side.

    def arrived(self, request_id: RequestId, first: TokenDelta) -> None:
        """All KV is here: generation goes on after `first`."""
        record = self._live.get(request_id)
        if record is None or not record.is_reserved:
            return
        record.is_reserved = False
        self._engine.activate(request_id, first)
        if first.finish_reason is not None:
            # The sequence ended with its first token; there is nothing to decode.
            self._end(record, _ended_with_first(first))

    def not_arrived(
        self, request_id: RequestId, message: str, unsettled: Sequence[BlockId]
    ) -> None:
        """The read failed or was dropped; `unsettled` blocks may still be written to."""
        record = self._live.get(request_id)
        if record is None:
            return
        delta = error_delta(request_id, message, is_retryable=True)
        if record.is_reserved:
            record.is_reserved = False
            self._engine.abandon(request_id, unsettled=unsettled)
            self._end(record, delta)
        elif record.session is not None:
            # Not reserved yet: the engine still has it in its queue.
            self._stop(record, delta)

    def settled(self, block_ids: Sequence[BlockId]) -> None:
        """Blocks given up as unsettled before can be used again."""
        self._engine.recover(block_ids)

    # Inside.

    def _checked(self, message: pb.Submit) -> GenerateRequest:
        if not message.request_id:
            raise InvalidRequest("request_id is empty")
        if message.request_id in self._live:
            raise InvalidRequest(f"request id {message.request_id} is already in use here")
        if message.deadline_ms == 0:
            raise InvalidRequest("deadline_ms must be at least 1, got 0", param="deadline_ms")
        return request_from_wire(message)

    def _reason_to_hand_back(self, role_version: int) -> str:
        roles = self._roles
        if not roles.takes_work:
            return "the worker is draining and takes no new work"
        if not roles.is_current(role_version):
            return (
                f"meant for version {role_version} of the worker's role, which is a "
                f"{roles.role.value} worker in version {roles.version}"
            )
        return ""

    def _deadline_passed(self, request_id: RequestId) -> None:
        record = self._live.get(request_id)
        if record is None or record.session is None:
            return
        message = f"deadline of {record.request.deadline_s:g} s passed on the worker"
        self._stop(record, error_delta(request_id, message, is_retryable=False))

    def _deliver(self, delta: TokenDelta) -> None:
        record = self._live.get(delta.request_id)
        if record is None:
            return
        if not is_last(delta):
            if record.session is not None:
                record.session.send(delta)
            return
        is_unwanted = record.session is None or delta.finish_reason in _UNFINISHED
        if record.session is None and delta.timeline is not None:
            _tell_late_use(record, delta.timeline)
        self._answer(record, delta)
        request_id, work = delta.request_id, record.request.work
        if work is Work.PREFILL and is_unwanted:
            self._leases.withdraw(request_id, delta.error or "the request was cancelled")
        if work.reads_all_kv:
            self._reads.drop(request_id)
        elif delta.timeline is not None:
            request = record.request
            num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
            self._holds.computed(num_tokens - delta.num_cached_tokens, delta.timeline)
        self._remove_unless_reserved(record)

    def _reserved(self, reservation: Reservation) -> None:
        record = self._live.get(reservation.request_id)
        if record is None or record.session is None:
            self._engine.abandon(reservation.request_id, unsettled=())
            if record is not None:
                self._end(record, None)
            return
        record.is_reserved = True
        self._reads.reserved(reservation)

    def _stop(self, record: _Record, answer: TokenDelta | None) -> None:
        """End a request towards its router now and make the engine let go of it."""
        self._answer(record, answer)
        request = record.request
        if record.is_held:
            self._stop_held(record)
            return
        is_waiting_or_running = not record.is_reserved
        if request.work.reads_all_kv:
            self._reads.drop(request.request_id)
        if is_waiting_or_running:
            self._engine.cancel(request.request_id)

    def _stop_held(self, record: _Record) -> None:
        request_id = record.request.request_id
        record.is_held = False
        self._holds.drop(request_id)
        if record.request.work is Work.PREFILL:
            # Its reader may be watching already.
            self._leases.withdraw(request_id, "the request was cancelled")
        self._end(record, None)
        self.repeat_load()

    def _answer(self, record: _Record, delta: TokenDelta | None) -> None:
        record.deadline.cancel()
        if record.session is not None and delta is not None:
            record.session.send(delta)
        record.session = None

    def _end(self, record: _Record, delta: TokenDelta | None) -> None:
        self._answer(record, delta)
        self._remove_unless_reserved(record)

    def _remove_unless_reserved(self, record: _Record) -> None:
        request_id = record.request.request_id
        if not record.is_reserved and self._live.get(request_id) is record:
            del self._live[request_id]


def _tell_late_use(record: _Record, timeline: Timeline) -> None:
    """The router has had its last delta and has yet to hear what the request has cost."""
    if timeline.engine.num_steps:
        record.owner.send_late_use(record.request.request_id, timeline.engine)


def _ended_with_first(first: TokenDelta) -> TokenDelta:
    """The decode worker's only delta of a sequence whose single token another worker sent."""
    return TokenDelta(
        first.request_id,
        first_index=first.first_index + len(first.token_ids),
        finish_reason=first.finish_reason,
        stop_token_id=first.stop_token_id,
        timeline=first.timeline,
    )
