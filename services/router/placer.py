"""From a request to a started attempt: look, decide by `policy`, submit.

Never waits. Retries and patience are the dispatcher's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import secrets

from baton.core.errors import WorkerLost
from baton.core.request import PeerRef, RequestId
from baton.core.worker_info import WorkerId
from services.router import prefix_source
from services.router.attempt import Attempt
from services.router.cluster_view import ClusterView
from services.router.config import PolicyConfig
from services.router.flight import Flight
from services.router.mailbox import Mailbox
from services.router.policy import Placement, PlacementRequest, place
from services.router.worker_pool import WorkerPool

WORKER_DEADLINE_MARGIN_S = 1.0
"""Workers give up this much later than the router, so the client gets the router's answer."""


class Placer:
    """Chooses and starts; one per router."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        policy: PolicyConfig,
        max_pending_deltas: int,
        rng: random.Random,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._max_pending_deltas = max_pending_deltas
        self._rng = rng
        self._tag = secrets.token_hex(3)
        self._num_attempts = 0

    def choose(self, flight: Flight) -> Placement:
        """Where the rest of the request should run now. Raises NoWorker."""
        view = self._pool.view()
        cached_blocks = self._cached_blocks(flight, view)
        request = PlacementRequest(
            model=flight.request.model,
            num_prompt_tokens=len(flight.request.prompt_token_ids) + flight.stream.next_index,
            max_tokens=flight.num_tokens_left,
            cached_tokens={
                w.info.worker_id: num_blocks * w.info.layout.block_size
                for w in view.workers
                if (num_blocks := cached_blocks.get(w.info.worker_id))
            },
            avoid=frozenset(flight.avoid),
        )
        placement = place(view, request, self._policy, self._rng)
        offer = prefix_source.offer(
            view,
            placement.computes_prompt,
            cached_blocks,
            num_prompt_tokens=request.num_prompt_tokens,
            min_offer_blocks=self._policy.min_offer_blocks,
        )
        return placement if offer is None else dataclasses.replace(placement, offer=offer)

    def start(self, flight: Flight, placement: Placement) -> Attempt:
        """Submit to the workers of `placement`. Raises WorkerLost when one has just gone."""
        now_s = asyncio.get_running_loop().time()
        sessions = [self._pool.session(w) for w in placement.workers]
        assert sessions[0].info is not None
        hashes = flight.block_hashes(sessions[0].info.layout)
        self._num_attempts += 1
        attempt = Attempt(
            RequestId(f"{flight.request.request_id}.{self._tag}{self._num_attempts:x}"),
            placement,
            Mailbox(self._max_pending_deltas, now_s=now_s),
            block_hashes=hashes,
        )
        flight.order.output_token_ids = tuple(flight.stream.token_ids)
        flight.stream.restart()
        deadline_s = worker_deadline_s(flight, now_s)
        try:
            attempt.start(flight.order, sessions, deadline_s, offered=self._offered(placement))
        except WorkerLost:
            attempt.close("a worker is gone", now_s)
            raise
        self._pool.index.touch(hashes)
        return attempt

    def _offered(self, placement: Placement) -> PeerRef | None:
        if placement.offer is None:
            return None
        try:
            return self._pool.session(placement.offer.source).peer_ref
        except WorkerLost:
            # The worker computes what it might have read.
            return None

    def _cached_blocks(self, flight: Flight, view: ClusterView) -> dict[WorkerId, int]:
        """Leading blocks of the prompt in each worker's prefix cache, as far as the index knows."""
        cached: dict[WorkerId, int] = {}
        layout_of = {w.info.worker_id: w.info.layout for w in view.workers}
        for layout in set(layout_of.values()):
            lengths = self._pool.index.match(flight.block_hashes(layout))
            cached |= {w: n for w, n in lengths.items() if layout_of.get(w) == layout}
        return cached


def worker_deadline_s(flight: Flight, now_s: float) -> float:
    """Seconds from now until a worker may give the request up."""
    return flight.deadline_at_s - now_s + WORKER_DEADLINE_MARGIN_S
