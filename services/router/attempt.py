"""One placement of one request: what was sent to which workers, and how it went wrong.

    remote_prefill   DECODE to the decode worker and PREFILL to the prefill worker, in parallel
    local_prefill    GENERATE to the decode worker
    prefill_only     GENERATE to the prefill worker

Every attempt has a request id of its own on the wire, so that a late message of a given-up
attempt can never be taken for one of the next.

Does not know: text, retry budgets, where workers come from.
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
from baton.core.worker_info import WorkerId, WorkerInfo
from services.router.mailbox import Arrival, Mailbox
from services.router.policy import Placement, PlacementKind
from services.router.session_client import WorkerSession
from services.router.wire_delta import is_last


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """Why a placement is given up."""

    reason: str
    blamed: WorkerId | None
    """The worker to avoid next time."""
    is_retryable: bool = True
    is_overload: bool = False
    """The worker has no room for the request."""


@dataclass(slots=True)
class WorkOrder:
    """The part of a request that does not depend on the placement."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...] = ()
    """Tokens the client has already."""


@dataclass(slots=True, eq=False)
class Attempt:
    """Live from `start` to `close`."""

    wire_id: RequestId
    placement: Placement
    mailbox: Mailbox
    sessions: dict[WorkerId, WorkerSession] = field(default_factory=dict)
    unfinished: set[WorkerId] = field(default_factory=set)
    """Workers that have not sent their last delta."""
    cached_seen: set[WorkerId] = field(default_factory=set)
    """Workers whose prefix cache hits have been counted."""
    is_handed_over: bool = False
    """The decode worker has been heard: it no longer needs the prefill worker."""

    @property
    def is_remote(self) -> bool:
        return self.placement.kind is PlacementKind.REMOTE_PREFILL

    @property
    def waits_for(self) -> WorkerId | None:
        """The worker whose turn it is."""
        if self.is_remote and self.placement.prefill in self.unfinished:
            return self.placement.prefill
        return next(iter(self.unfinished), None)

    def computes_prompt(self, worker_id: WorkerId) -> bool:
        return self._work_of(worker_id) is not Work.DECODE

    def start(
        self,
        order: WorkOrder,
        sessions: Sequence[WorkerSession],
        block_hashes: tuple[BlockHash, ...],
        deadline_s: float,
    ) -> None:
        """Submit to every worker of the placement, the decode worker first.

        Raises WorkerLost when one of them is gone; `close` then takes the others back.
        """
        by_role = {_info(s).worker_id: s for s in sessions}
        placement = self.placement
        peer = None
        if self.is_remote:
            assert placement.prefill is not None
            info = _info(by_role[placement.prefill])
            peer = PeerRef(info.worker_id, info.epoch, info.address)
        for worker_id in (placement.decode, placement.prefill):
            if worker_id is None:
                continue
            work = self._work_of(worker_id)
            request = GenerateRequest(
                request_id=self.wire_id,
                work=work,
                prompt_token_ids=order.prompt_token_ids,
                sampling=order.sampling,
                block_hashes=block_hashes,
                output_token_ids=order.output_token_ids,
                eos_token_ids=order.eos_token_ids,
                prefill_peer=peer if work is Work.DECODE else None,
                deadline_s=deadline_s,
            )
            terms = placement.terms_of(worker_id)
            by_role[worker_id].submit(
                request,
                self.mailbox,
                prefill_tokens=0 if work is Work.DECODE else terms.uncached,
                kv_tokens=len(order.prompt_token_ids) + len(order.output_token_ids),
            )
            self.sessions[worker_id] = by_role[worker_id]
            self.unfinished.add(worker_id)

    def observe(self, arrival: Arrival) -> AttemptFailure | None:
        """Follow one arrival; returns what ends the attempt, if it does."""
        worker_id, delta = arrival.worker_id, arrival.delta
        if delta is None:
            if worker_id is not None and worker_id not in self.unfinished:
                return None
            return AttemptFailure(arrival.lost, worker_id)
        if self.is_remote and worker_id == self.placement.decode and delta.token_ids:
            self.is_handed_over = True
        if worker_id is not None and is_last(delta):
            self.unfinished.discard(worker_id)
        if delta.finish_reason is FinishReason.ERROR:
            return self._failed(worker_id, delta)
        if delta.finish_reason is FinishReason.CANCELLED:
            return AttemptFailure("the worker ended the request", worker_id)
        return None

    def close(self, reason: str) -> None:
        """Cancel wherever the request is still alive, or its KV still kept for a reader."""
        for worker_id, session in self.sessions.items():
            is_kept = (
                self.is_remote and worker_id == self.placement.prefill and not self.is_handed_over
            )
            if worker_id in self.unfinished or is_kept:
                session.cancel(self.wire_id, reason)
            else:
                session.forget(self.wire_id)
        self.unfinished.clear()

    def _work_of(self, worker_id: WorkerId) -> Work:
        if not self.is_remote:
            return Work.GENERATE
        return Work.PREFILL if worker_id == self.placement.prefill else Work.DECODE

    def _failed(self, worker_id: WorkerId | None, delta: TokenDelta) -> AttemptFailure:
        placement, blamed = self.placement, worker_id
        is_reading = self.is_remote and placement.prefill not in self.unfinished
        may_be_read = is_reading and not self.is_handed_over and not delta.is_overload
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
