"""The router's pure parts, fed by simulated workers: index, table, policy, performance model.

What `services/router` learns from sessions it is told here by calls. With several copies each has
its own picture of the workers.

Does not know: engines, how long things take.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from baton.core.block import BlockHash
from baton.core.kv_layout import KvLayout
from baton.core.lifecycle import Timeline
from baton.core.request import RequestId
from baton.core.worker_info import LoadReport, Role, WorkerId, WorkerInfo
from baton.telemetry.metrics import Metrics
from services.router.index.predicted import PredictedPrefixes
from services.router.index.prefix_index import PrefixIndex
from services.router.placement.affinity import SessionAffinity
from services.router.placement.comparison_policies import make_policy
from services.router.placement.load_book import UNREPORTED_S, LoadBook
from services.router.placement.perf_model import PerfModel
from services.router.placement.perf_observer import PerfObserver
from services.router.placement.placement import Placement, PlacementRequest
from services.router.placement.policy import Hits
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.topology import LinkPrices
from services.router.placement.worker_table import WorkerTable
from services.router.requests.step_gap import Decoding, StepGap

MAX_INDEX_ENTRIES = 1_000_000
MODEL = "simulated"


class SimRouter:
    """One router copy."""

    def __init__(self, policy: PolicyConfig, *, seed: int) -> None:
        rng = random.Random(seed)
        self.perf = PerfModel()
        self._index = PrefixIndex(MAX_INDEX_ENTRIES)
        self._predicted = PredictedPrefixes()
        self._table = WorkerTable(LinkPrices.from_config(policy))
        self._observer = PerfObserver(self.perf, self._table, Metrics())
        self._books: dict[WorkerId, LoadBook] = {}
        self._gaps: dict[WorkerId, StepGap] = {}
        self._policy = make_policy(policy, self.perf, rng)
        self._affinity = SessionAffinity(policy.max_sessions)

    def join(self, info: WorkerInfo, load: LoadReport) -> None:
        book = self._books[info.worker_id] = LoadBook()
        self._gaps[info.worker_id] = StepGap()
        book.report(load, 0.0)
        self._table.join(info, book, slot=self._index.slot_of(info.worker_id))

    def drain(self, worker_id: WorkerId) -> None:
        """Nothing more is placed there; what runs there goes on, what it caches can be read."""
        self._table.set_leaving(worker_id, True)

    def leave(self, worker_id: WorkerId) -> None:
        """It has ended."""
        self._table.leave(worker_id)
        self._index.remove_worker(worker_id)

    def num_computing(self) -> int:
        """Workers that new prompts can go to."""
        taking = [row.info.role for row in self._table.rows() if not row.is_leaving]
        return taking.count(Role.PREFILL) or len(taking)

    def decoding(self, worker_id: WorkerId, now_s: float) -> Decoding | None:
        """What the worker decodes now; None when it does not."""
        return self._gaps[worker_id].decoding(now_s)

    def place(
        self,
        hashes: Sequence[BlockHash],
        *,
        num_prompt_tokens: int,
        max_tokens: int,
        session_key: str,
        now_s: float,
    ) -> Placement:
        """Raises NoWorker."""
        pools = self._table.pools(MODEL)
        request = PlacementRequest(
            MODEL,
            num_prompt_tokens,
            max_tokens,
            last_workers=self._affinity.last_workers("", session_key),
        )
        hits = [self._hits(hashes, pool.layout, now_s) for pool in pools]
        return self._policy.place(self._table, pools, hits, request)

    def sent(
        self,
        request_id: RequestId,
        placement: Placement,
        hashes: Sequence[BlockHash],
        *,
        num_prompt_tokens: int,
        session_key: str,
        now_s: float,
    ) -> None:
        """The placement has been submitted by this copy."""
        self._note(request_id, placement, hashes, num_prompt_tokens, now_s, is_ours=True)
        self._index.touch(hashes)
        self._affinity.note("", session_key, placement.workers)

    def sent_by_other(
        self,
        request_id: RequestId,
        placement: Placement,
        hashes: Sequence[BlockHash],
        *,
        num_prompt_tokens: int,
        now_s: float,
    ) -> None:
        """Another copy says what it has submitted."""
        # As the real router does: the news is late already, so the next report contains it.
        sent_s = now_s - UNREPORTED_S
        self._note(request_id, placement, hashes, num_prompt_tokens, sent_s, is_ours=False)

    def ended(self, request_id: RequestId, worker_id: WorkerId) -> None:
        """The worker has said its last word on a request of this copy."""
        self._books[worker_id].ended(request_id)

    def heard(
        self,
        worker_id: WorkerId,
        load: LoadReport,
        stored: Sequence[BlockHash],
        removed: Sequence[BlockHash],
        now_s: float,
        *,
        has_tokens: bool = False,
    ) -> None:
        """One message of a worker, at the end of a step. `has_tokens`: of requests of this copy."""
        if has_tokens:
            self._gaps[worker_id].note(
                now_s, 1, num_sequences=load.num_running, kv_tokens=load.resident_kv_tokens
            )
        if removed:
            self._index.remove(worker_id, removed)
        if stored:
            self._index.store(worker_id, stored)
        self._books[worker_id].report(load, now_s)

    def learn(
        self,
        placement: Placement,
        timeline: Timeline,
        *,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_output_tokens: int,
    ) -> None:
        """A request has ended."""
        self._observer.observe(
            placement,
            timeline,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            num_output_tokens=num_output_tokens,
        )

    def _note(
        self,
        request_id: RequestId,
        placement: Placement,
        hashes: Sequence[BlockHash],
        num_prompt_tokens: int,
        now_s: float,
        *,
        is_ours: bool,
    ) -> None:
        for worker_id in placement.workers:
            computes = worker_id == placement.computes_prompt
            self._books[worker_id].sent(
                request_id,
                prefill_tokens=placement.terms_of(worker_id).uncached if computes else 0,
                kv_tokens=num_prompt_tokens,
                now_s=now_s,
                is_ours=is_ours,
            )
        # A decode worker gets the KV a prefill later; siblings must not be computed there.
        self._predicted.note(hashes, placement.computes_prompt, now_s)

    def _hits(self, hashes: Sequence[BlockHash], layout: KvLayout, now_s: float) -> Hits:
        held = self._index.match(hashes)
        return Hits(self._predicted.merge(held, hashes, now_s), held)
