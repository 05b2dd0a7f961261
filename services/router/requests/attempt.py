"""One placement of one request: what was sent to which workers, and how it went wrong.

    remote_prefill   DECODE to the decode worker and PREFILL to the prefill worker, in parallel
    local_prefill    GENERATE to the decode worker
    prefill_only     GENERATE to the prefill worker

Every attempt has a request id of its own on the wire, so that a late message of a given-up
attempt can never be taken for one of the next.

While a request runs, another worker may take it over (`take_over`): the attempt then follows both
until the old one has said its last word. An attempt that ends takes its move back with it, so that
no request is moved and placed anew at once.

Does not know: text, retry budgets, where workers come from, when to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from baton.core.block import BlockHash
from baton.core.request import (
    FinishReason,
    GenerateRequest,
    PeerRef,
    RequestId,
    SamplingParams,
    TokenDelta,
    Work,
)
from baton.core.worker_info import Epoch, Role, WorkerId, WorkerInfo
from services.router.migration.handover import Handover, HandoverState
from services.router.placement.policy import Placement, PlacementKind
from services.router.requests.mailbox import Arrival, Mailbox
from services.router.workers.session_client import WorkerSession
from services.router.workers.wire_delta import is_last


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """Why a placement is given up."""

    reason: str
    blamed: WorkerId | None
    """The worker to avoid next time."""
    is_retryable: bool = True
    is_overload: bool = False
    """The worker has no room for the request."""
    is_lost: bool = False
    """The worker's session has ended; another one may come."""
    is_handed_back: bool = False
    """The worker leaves its pool: nobody has failed."""


@dataclass(slots=True)
class WorkOrder:
    """The part of a request that does not depend on the placement."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    """Tokens the client has already."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)


@dataclass(slots=True, eq=False)
class Attempt:
    """Live from `start` to `close`."""

    wire_id: RequestId
    placement: Placement
    mailbox: Mailbox
    sessions: dict[WorkerId, WorkerSession] = field(default_factory=dict)
    roles: dict[WorkerId, Role] = field(default_factory=dict)
    """Of the workers when they were asked; they may have others by now."""
    unfinished: set[WorkerId] = field(default_factory=set)
    """Workers that have not sent their last delta."""
    spoken: set[WorkerId] = field(default_factory=set)
    """Workers that have sent tokens."""
    cached_seen: set[WorkerId] = field(default_factory=set)
    """Workers whose prefix cache hits have been counted."""
    block_hashes: tuple[BlockHash, ...] = ()
    handover: Handover | None = None
    """The last move of the request to another worker."""
    silenced: set[tuple[WorkerId, Epoch]] = field(default_factory=set)
    """Processes told to give up a move; what they still say must not be taken for news of another
    move, so they never get this wire id again."""
    _moved_to: WorkerId | None = None
    """The generator before `handover`, when it is not the placement's."""

    @property
    def is_remote(self) -> bool:
        return self.placement.kind is PlacementKind.REMOTE_PREFILL

    @property
    def generator(self) -> WorkerId:
        """The worker that generates now."""
        if self.handover is not None and self.handover.has_moved:
            return self.handover.target
        worker_id = self._moved_to or self.placement.decode or self.placement.prefill
        assert worker_id is not None
        return worker_id

    @property
    def is_moving(self) -> bool:
        return self.handover is not None and self.handover.is_pending

    @property
    def can_move(self) -> bool:
        """The request generates, on one worker alone, whose last delta has not arrived."""
        generator = self.generator
        return (
            self.unfinished == {generator}
            and generator in self.spoken
            and self.sessions[generator].is_running(self.wire_id)
        )

    @property
    def waits_for(self) -> WorkerId | None:
        """The worker whose turn it is; None during a move, which has a time limit of its own, and
        while the reader has yet to take what has arrived."""
        if self.is_moving or self.mailbox.unread:
            return None
        if self.is_remote and self.placement.prefill in self.unfinished:
            return self.placement.prefill
        generator = self.generator
        return generator if generator in self.unfinished else next(iter(self.unfinished), None)

    def computes_prompt(self, worker_id: WorkerId) -> bool:
        return self._work_of(worker_id) is not Work.DECODE

    def role_of(self, worker_id: WorkerId) -> Role:
        return self.roles[worker_id]

    def start(
        self,
        order: WorkOrder,
        sessions: Sequence[WorkerSession],
        deadline_s: float,
        *,
        offered: PeerRef | None = None,
    ) -> None:
        """Submit to every worker of the placement, the decode worker first.

        `offered`: who caches more of the prompt than the worker that computes it. Raises
        WorkerLost when one of the workers is gone; `close` then takes the others back.
        """
        by_id = {_info(s).worker_id: s for s in sessions}
        placement = self.placement
        for worker_id in (placement.decode, placement.prefill):
            if worker_id is None:
                continue
            work, source = self._work_of(worker_id), offered
            prefill_tokens = placement.terms_of(worker_id).uncached
            if work is Work.DECODE:
                assert placement.prefill is not None
                source, prefill_tokens = by_id[placement.prefill].peer_ref, 0
            by_id[worker_id].submit(
                self._request(order, work, source, deadline_s),
                self.mailbox,
                prefill_tokens=prefill_tokens,
                kv_tokens=order.num_tokens,
            )
            self.sessions[worker_id] = by_id[worker_id]
            self.roles[worker_id] = _info(by_id[worker_id]).role
            self.unfinished.add(worker_id)

    def take_over(
        self, order: WorkOrder, handover: Handover, target: WorkerSession, deadline_s: float
    ) -> None:
        """Ask `target` to go on with the request; only while it `can_move`.

        Raises WorkerLost when the target is gone: nothing has changed then.
        """
        assert self.can_move and handover.source == self.generator, "not movable now"
        source = self.sessions[handover.source].peer_ref
        target.submit(
            self._request(order, Work.TAKEOVER, source, deadline_s),
            handover,
            prefill_tokens=0,
            kv_tokens=order.num_tokens,
        )
        self._moved_to, self.handover = handover.source, handover
        self.sessions[handover.target] = target
        self.roles[handover.target] = _info(target).role
        self.unfinished.add(handover.target)

    def give_up_move(self, reason: str, *, at_s: float, now_s: float) -> None:
        """The target has taken too long: the source goes on. `at_s`: wall clock; `now_s`: loop."""
        handover = self.handover
        assert handover is not None and handover.is_pending, "no move to give up"
        session = self.sessions[handover.target]
        self.silenced.add((handover.target, _info(session).epoch))
        session.cancel(self.wire_id, reason)
        handover.put(Arrival(handover.target, at_s, lost=reason), now_s)

    def is_plain(self, worker_id: WorkerId | None, delta: TokenDelta) -> bool:
        """Tokens of a worker that has sent some and sends more, and nothing to note beside them;
        `observe` would find nothing."""
        return (
            delta.finish_reason is None
            and delta.timeline is None
            and not delta.num_cached_tokens
            and worker_id in self.spoken
            and worker_id in self.unfinished
            and self.handover is None
            and bool(delta.token_ids)
        )

    def observe(self, arrival: Arrival) -> AttemptFailure | None:
        """Follow one arrival; returns what ends the attempt, if it does."""
        worker_id, delta = arrival.worker_id, arrival.delta
        if delta is None:
            return self._lost(worker_id, arrival.lost)
        if worker_id is not None:
            if delta.token_ids:
                self.spoken.add(worker_id)
            if is_last(delta):
                self.unfinished.discard(worker_id)
        if delta.finish_reason is FinishReason.ERROR:
            return None if self._has_left(worker_id) else self._failed(worker_id, delta)
        if delta.finish_reason is FinishReason.CANCELLED and not self._has_left(worker_id):
            return AttemptFailure("the worker ended the request", worker_id)
        return None

    def check_order(self, *, is_waiting: bool) -> AttemptFailure | None:
        """Whether what is still to come can ever come.

        `is_waiting`: tokens are here that cannot be used before earlier ones.
        """
        awaits_earlier = bool(self.unfinished - {self.generator}) and not self.is_moving
        if is_waiting and not awaits_earlier:
            return AttemptFailure("gap in the output positions", self.generator)
        if self.unfinished:
            return None
        handover = self.handover
        if handover is not None and handover.state is HandoverState.FAILED:
            return AttemptFailure(
                f"handed on to {handover.target}, which failed: {handover.failure}",
                handover.target,
            )
        return AttemptFailure("ended without a finish reason", self.generator)

    def close(self, reason: str, now_s: float) -> None:
        """Cancel wherever the request is still alive, or its KV still kept for a reader."""
        is_read = self.placement.decode in self.spoken
        for worker_id, session in self.sessions.items():
            is_kept = self.is_remote and worker_id == self.placement.prefill and not is_read
            if worker_id in self.unfinished or is_kept:
                session.cancel(self.wire_id, reason)
            else:
                session.forget(self.wire_id)
        self.unfinished.clear()
        if self.handover is not None:
            self.handover.void(now_s)

    def _request(
        self, order: WorkOrder, work: Work, source: PeerRef | None, deadline_s: float
    ) -> GenerateRequest:
        return GenerateRequest(
            request_id=self.wire_id,
            work=work,
            prompt_token_ids=order.prompt_token_ids,
            sampling=order.sampling,
            block_hashes=self.block_hashes,
            output_token_ids=order.output_token_ids,
            eos_token_ids=order.eos_token_ids,
            kv_source=source,
            deadline_s=deadline_s,
        )

    def _work_of(self, worker_id: WorkerId) -> Work:
        if not self.is_remote:
            return Work.GENERATE
        return Work.PREFILL if worker_id == self.placement.prefill else Work.DECODE

    def _has_left(self, worker_id: WorkerId | None) -> bool:
        """The worker's tokens count, but it can no longer fail: another one has the request."""
        handover = self.handover
        return handover is not None and handover.has_moved and worker_id == handover.source

    def _lost(self, worker_id: WorkerId | None, reason: str) -> AttemptFailure | None:
        if worker_id is not None and worker_id not in self.unfinished:
            return None
        if worker_id is not None and self._has_left(worker_id):
            self.unfinished.discard(worker_id)
            return None
        return AttemptFailure(reason, worker_id, is_lost=True)

    def _failed(self, worker_id: WorkerId | None, delta: TokenDelta) -> AttemptFailure:
        placement, blamed = self.placement, worker_id
        if delta.is_handed_back:
            return AttemptFailure(delta.error, blamed, is_handed_back=True)
        is_reading = self.is_remote and placement.prefill not in self.unfinished
        is_handed_over = placement.decode in self.spoken
        may_be_read = is_reading and not is_handed_over and not delta.is_overload
        if worker_id == placement.decode and may_be_read:
            # Most likely the read failed. Computing the prompt where it is needed avoids the
            # pair; if that fails as well, the decode worker itself gets the blame.
            blamed = placement.prefill
        return AttemptFailure(
            delta.error or "unnamed error", blamed, delta.is_retryable, delta.is_overload
        )


def _info(session: WorkerSession) -> WorkerInfo:
    assert session.info is not None, "a session without Welcome is never placed on"
    return session.info
