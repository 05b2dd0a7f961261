"""Where a request runs. Pure: a view of the cluster in, a placement with its reasons out.

    remote_prefill   prompt on a prefill worker, tokens on a decode worker
    local_prefill    all on one decode worker: little to compute, or no prefill worker
    prefill_only     all on one prefill worker: one token asked for, or no decode worker

Costs are in prompt tokens, the lowest wins, equal ones are drawn by `rng`:

    prefill = uncached + uncached * (cached + uncached / 2) / attention_crossover + queued
    decode  = resident KV + running * running_cost + new KV + shortage_factor * missing KV room

where `uncached` is what the worker's prefix cache does not hold. The terms are a sum over the two
workers, so the best pair among workers of one KV layout is the best of each pool.

Does not know: sessions, hashes, asyncio, time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeVar

from baton.core.errors import NoWorker
from baton.core.kv_layout import KvLayout
from baton.core.worker_info import Role, WorkerId
from services.router.cluster_view import ClusterView, WorkerState
from services.router.config import PolicyConfig

T = TypeVar("T")


class PlacementKind(Enum):
    REMOTE_PREFILL = "remote_prefill"
    LOCAL_PREFILL = "local_prefill"
    PREFILL_ONLY = "prefill_only"


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What placement needs to know of a request."""

    model: str
    num_prompt_tokens: int
    """Prompt and, in a replay, the tokens produced so far."""
    max_tokens: int
    """Tokens still to be produced."""
    cached_tokens: Mapping[WorkerId, int] = field(default_factory=dict)
    """Prompt tokens whose KV is in each worker's prefix cache."""
    avoid: frozenset[WorkerId] = frozenset()
    """Workers that failed this request; taken only when there is no other."""


class ScoreTerms(NamedTuple):
    """How one candidate was judged, in tokens."""

    worker_id: WorkerId
    role: Role
    cached: int
    uncached: int
    queued_prefill: int
    resident_kv: int
    num_sequences: int
    missing_kv: int
    """Tokens of KV the request needs and the worker has no blocks for."""
    prefill_cost: float
    decode_cost: float


class PrefixOffer(NamedTuple):
    """A worker that caches more of the prompt than the one that computes it."""

    source: WorkerId
    num_blocks: int
    """Leading blocks of the prompt that it caches."""
    num_own_blocks: int
    """Those that the computing worker caches itself."""


class Prediction(NamedTuple):
    """What a placement would give its client if the request were placed now. Seconds."""

    ttft_s: float
    """From now to the first token: work queued before it, transfer of a fetched prefix, prefill."""
    itl_s: float
    """Between tokens in the decode batch it would join."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` and `decode` name workers; the kind says which of them are set."""

    kind: PlacementKind
    prefill: WorkerId | None
    decode: WorkerId | None
    score: float
    reason: str
    terms: tuple[ScoreTerms, ...]
    """Of all candidates."""
    offer: PrefixOffer | None = None
    predicted: Prediction | None = None
    """None by policies that do not predict."""

    @property
    def computes_prompt(self) -> WorkerId:
        worker_id = self.prefill or self.decode
        assert worker_id is not None
        return worker_id

    @property
    def workers(self) -> tuple[WorkerId, ...]:
        return tuple(w for w in (self.prefill, self.decode) if w is not None)

    def terms_of(self, worker_id: WorkerId) -> ScoreTerms:
        return next(t for t in self.terms if t.worker_id == worker_id)


def place(
    view: ClusterView, request: PlacementRequest, config: PolicyConfig, rng: random.Random
) -> Placement:
    """The best placement on live workers. Raises NoWorker when nobody can take the request."""
    eligible = view.eligible(model=request.model)
    fitting = [w for w in eligible if request.num_prompt_tokens < w.info.max_model_len]
    candidates = [w for w in fitting if w.info.worker_id not in request.avoid] or fitting
    if not candidates:
        raise NoWorker(_why_none(view, request, eligible))
    groups: dict[KvLayout, list[WorkerState]] = {}
    for worker in candidates:
        groups.setdefault(worker.info.layout, []).append(worker)
    placements = [_place_in_group(group, request, config, rng) for group in groups.values()]
    return _cheapest(((p.score, p) for p in placements), rng)


def _place_in_group(
    group: Sequence[WorkerState],
    request: PlacementRequest,
    config: PolicyConfig,
    rng: random.Random,
) -> Placement:
    """Among workers whose KV blocks are interchangeable."""
    terms = tuple(score(worker, request, config) for worker in group)
    prefills = [t for t in terms if t.role is Role.PREFILL]
    decodes = [t for t in terms if t.role is Role.DECODE]

    def alone(kind: PlacementKind, among: Sequence[ScoreTerms], reason: str) -> Placement:
        best = _cheapest(((t.prefill_cost + t.decode_cost, t) for t in among), rng)
        cost = best.prefill_cost + best.decode_cost
        is_prefill = best.role is Role.PREFILL
        return Placement(
            kind,
            best.worker_id if is_prefill else None,
            None if is_prefill else best.worker_id,
            cost,
            reason,
            terms,
        )

    if not prefills:
        return alone(PlacementKind.LOCAL_PREFILL, decodes, "no prefill worker answers")
    if not decodes:
        return alone(PlacementKind.PREFILL_ONLY, prefills, "no decode worker answers")
    if request.max_tokens == 1:
        return alone(PlacementKind.PREFILL_ONLY, prefills, "a single token is asked for")
    short = [t for t in decodes if _prefers_local(t, config)]
    if short:
        return alone(PlacementKind.LOCAL_PREFILL, short, "few uncached tokens")
    prefill = _cheapest(((t.prefill_cost, t) for t in prefills), rng)
    decode = _cheapest(((t.decode_cost, t) for t in decodes), rng)
    return Placement(
        PlacementKind.REMOTE_PREFILL,
        prefill.worker_id,
        decode.worker_id,
        prefill.prefill_cost + decode.decode_cost,
        "lowest cost",
        terms,
    )


def _prefers_local(terms: ScoreTerms, config: PolicyConfig) -> bool:
    return (
        terms.uncached <= config.local_prefill_max_tokens
        and terms.queued_prefill <= config.local_prefill_max_queued_tokens
        and not terms.missing_kv
    )


def score(worker: WorkerState, request: PlacementRequest, config: PolicyConfig) -> ScoreTerms:
    """Both costs of one worker, whatever its role: either pool can stand in for the other."""
    info = worker.info
    # The last prompt token is always computed: its logits give the first token.
    cached = min(request.cached_tokens.get(info.worker_id, 0), request.num_prompt_tokens - 1)
    uncached = request.num_prompt_tokens - cached
    queued = worker.queued_prefill_tokens
    attention = uncached * (cached + uncached / 2) / config.attention_crossover_tokens
    output = min(request.max_tokens, config.expected_output_tokens)
    new_kv = uncached + output
    missing = max(0, new_kv - worker.available_blocks * info.layout.block_size)
    resident = worker.resident_kv_tokens
    num_sequences = worker.num_sequences
    return ScoreTerms(
        info.worker_id,
        info.role,
        cached,
        uncached,
        queued,
        resident,
        num_sequences,
        missing,
        prefill_cost=uncached + attention + queued,
        decode_cost=resident
        + num_sequences * config.running_cost_tokens
        + new_kv
        + missing * config.shortage_factor,
    )


def _cheapest(scored: Iterable[tuple[float, T]], rng: random.Random) -> T:
    """The item of the lowest cost; among equals one at random, so that routers do not herd."""
    items = list(scored)
    lowest = min(cost for cost, _ in items)
    best = [item for cost, item in items if cost <= lowest]
    return best[0] if len(best) == 1 else rng.choice(best)


def _why_none(view: ClusterView, request: PlacementRequest, eligible: Sequence[WorkerState]) -> str:
    if eligible:
        longest = max(w.info.max_model_len for w in eligible)
        return (
            f"no worker takes {request.num_prompt_tokens} tokens; "
            f"the longest context served now is {longest}"
        )
    known = [w for w in view.workers if w.info.model_name == request.model]
    if not known:
        return f"no worker for model {request.model!r} is connected; try again in a moment"
    num_lost = sum(1 for w in known if w.is_quarantined)
    num_unhealthy = sum(1 for w in known if w.load.is_unhealthy and not w.is_quarantined)
    num_draining = len(known) - num_lost - num_unhealthy
    return (
        f"none of {len(known)} workers for model {request.model!r} takes work now: "
        f"{num_lost} do not answer, {num_unhealthy} are unhealthy, {num_draining} are draining; "
        "try again in a moment"
    )
