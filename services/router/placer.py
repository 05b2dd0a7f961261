"""From a request to a started attempt: look, decide by `policy`, submit.

Never waits. Retries and patience are the dispatcher's.
"""

from __future__ import annotations

import asyncio
import random
import secrets

from baton.core.errors import WorkerLost
from baton.core.request import RequestId
from baton.core.worker_info import WorkerId
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
        request = PlacementRequest(
            model=flight.request.model,
            num_prompt_tokens=len(flight.request.prompt_token_ids) + flight.stream.next_index,
            max_tokens=flight.num_tokens_left,
            cached_tokens=self._cached_tokens(flight, view),
            avoid=frozenset(flight.avoid),
        )
        return place(view, request, self._policy, self._rng)

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
        )
        flight.order.output_token_ids = tuple(flight.stream.token_ids)
        flight.stream.restart()
        deadline_s = flight.deadline_at_s - now_s + WORKER_DEADLINE_MARGIN_S
        try:
            attempt.start(flight.order, sessions, hashes, deadline_s)
        except WorkerLost:
            attempt.close("a worker is gone")
            raise
        self._pool.index.touch(hashes)
        return attempt

    def _cached_tokens(self, flight: Flight, view: ClusterView) -> dict[WorkerId, int]:
        """Prompt tokens in each worker's prefix cache, as far as the index knows."""
        cached: dict[WorkerId, int] = {}
        for layout in {w.info.layout for w in view.workers}:
            lengths = self._pool.index.match(flight.block_hashes(layout))
            for worker_id, num_blocks in lengths.items():
                cached[worker_id] = num_blocks * layout.block_size
        return cached
