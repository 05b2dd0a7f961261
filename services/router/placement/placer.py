"""From a request to a started attempt: look, decide by `policy`, submit.

Never waits. Retries and patience are the dispatcher's.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable

from baton.core.block import Hashes, join_hashes
from baton.core.errors import WorkerLost
from baton.core.kv_layout import KvLayout
from baton.core.request import PeerRef, RequestId
from baton.core.worker_info import WorkerId
from services.router.index.predicted import PredictedPrefixes
from services.router.placement.affinity import SessionAffinity
from services.router.placement.comparison_policies import make_policy
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import Placement, PlacementRequest
from services.router.placement.policy import Hits
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.revisions import pools_of_revision
from services.router.requests.attempt import Attempt
from services.router.requests.flight import Flight
from services.router.requests.mailbox import Mailbox
from services.router.requests.pacing import Pacer
from services.router.workers.worker_pool import WorkerPool

WORKER_DEADLINE_MARGIN_S = 1.0
"""Workers give up this much later than the router, so the client gets the router's answer."""


OnPlaced = Callable[[Placement, Hashes, int], None]


class Placer:
    """Chooses and starts; one per router."""

    def __init__(
        self,
        pool: WorkerPool,
        *,
        policy: PolicyConfig,
        max_pending_deltas: int,
        rng: random.Random,
        perf: PerfModel | None = None,
        predicted: PredictedPrefixes | None = None,
    ) -> None:
        """`perf`: what predictions are made with; whoever learns shares it. `predicted`: what
        workers have just been sent, by this router and those that tell it."""
        self.perf = perf or PerfModel()
        self.predicted = PredictedPrefixes() if predicted is None else predicted
        self._pool = pool
        self._policy = make_policy(policy, self.perf, rng)
        self._affinity = SessionAffinity(policy.max_sessions)
        self._max_pending_deltas = max_pending_deltas
        self._pacer = Pacer()
        self.on_placed: OnPlaced | None = None
        """Told of every start: placement, full blocks of the prompt, its tokens."""
        self._tag = secrets.token_hex(3)
        self._num_attempts = 0

    def choose(self, flight: Flight, *, resting: frozenset[WorkerId] = frozenset()) -> Placement:
        """Where the rest of the request should run now. Changes nothing. Raises NoWorker.

        `resting`: workers to take only when there is no other.
        """
        given = flight.request
        pools = self._pool.table.pools(given.model)
        if flight.stream.next_index:
            pools = pools_of_revision(pools, flight.model_id)
        request = PlacementRequest(
            given.model,
            len(given.prompt_token_ids) + flight.stream.next_index,
            flight.num_tokens_left,
            avoid=resting.union(flight.avoid) if flight.avoid else resting,
            last_workers=self._affinity.last_workers(given.tenant, given.session_key),
        )
        now_s = asyncio.get_running_loop().time()
        hits = [self._hits(flight, pool.layout, now_s) for pool in pools]
        return self._policy.place(self._pool.table, pools, hits, request)

    def _hits(self, flight: Flight, layout: KvLayout, now_s: float) -> Hits:
        hashes = flight.block_hashes(layout)
        held = self._pool.index.match(hashes)
        return Hits(self.predicted.merge(held, hashes, now_s), held)

    def start(self, flight: Flight, placement: Placement) -> Attempt:
        """Submit to the workers of `placement`. Raises WorkerLost when one has just gone."""
        now_s = asyncio.get_running_loop().time()
        sessions = [self._pool.session(w) for w in placement.workers]
        assert sessions[0].info is not None
        layout = sessions[0].info.layout
        flight.model_id = layout.model_id
        hashes = flight.block_hashes(layout)
        self._num_attempts += 1
        attempt = Attempt(
            RequestId(f"{flight.request.request_id}.{self._tag}{self._num_attempts:x}"),
            placement,
            Mailbox(self._max_pending_deltas, now_s=now_s, pacer=self._pacer),
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
        joined = join_hashes(hashes)
        if self.on_placed is not None:
            self.on_placed(placement, joined, flight.order.num_tokens)
        self._pool.index.touch(joined)
        self.predicted.note(joined, placement.computes_prompt, now_s)
        self._affinity.note(flight.request.tenant, flight.request.session_key, placement.workers)
        placement.settle()
        return attempt

    def _offered(self, placement: Placement) -> PeerRef | None:
        if placement.offer is None:
            return None
        try:
            return self._pool.session(placement.offer.source).peer_ref
        except WorkerLost:
            # The worker computes what it might have read.
            return None


def worker_deadline_s(flight: Flight, now_s: float) -> float:
    """Seconds from now until a worker may give the request up."""
    return flight.deadline_at_s - now_s + WORKER_DEADLINE_MARGIN_S
