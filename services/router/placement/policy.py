"""Where a request runs. Pure: the table, a match and a model in, a placement with its reasons out.

    remote_prefill   prompt on a prefill worker, tokens on a decode worker: the cheapest of all
                     pairs, since what the hand-off costs depends on both
    local_prefill    all on one decode worker: predicted to be cheaper than any pair and within the
                     limits set for it, or no prefill worker answers
    prefill_only     all on one prefill worker: one token asked for, or no decode worker answers

The lowest cost wins; equal ones, or with a temperature near ones, are drawn by `Noise`. What a
candidate costs is in `scoring`, from where it gets its prefix in `prefix_source`.

Does not know: sessions, hashes, asyncio, time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.core.errors import NoWorker
from baton.core.worker_info import WorkerId
from services.router.index.prefix_match import PrefixMatch
from services.router.placement.candidates import Pool
from services.router.placement.choice import Choice, Noise
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import (
    Placement,
    PlacementKind,
    PlacementRequest,
    Prediction,
    PrefixOffer,
    ScoreTerms,
)
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.scoring import score_decode, score_local, score_prefill
from services.router.placement.sheet import Sheet
from services.router.placement.worker_table import WorkerTable

__all__ = [
    "CostPolicy",
    "Hits",
    "Noise",
    "Placement",
    "PlacementKind",
    "PlacementPolicy",
    "PlacementRequest",
    "Prediction",
    "PrefixOffer",
    "ScoreTerms",
    "candidate_pools",
    "place",
]


class Hits(NamedTuple):
    """What is cached of a prompt, in the hashes of one pool's layout."""

    match: PrefixMatch
    """With prefixes that workers have only been sent."""
    held: PrefixMatch
    """Without them: what workers have said they hold."""


class PlacementPolicy(Protocol):
    """One way to choose; knows its settings, and whatever it remembers."""

    def place(
        self,
        table: WorkerTable,
        pools: Sequence[Pool],
        hits: Sequence[Hits],
        request: PlacementRequest,
    ) -> Placement:
        """As `policy.place`."""
        ...


def place(
    table: WorkerTable,
    pools: Sequence[Pool],
    hits: Sequence[Hits],
    request: PlacementRequest,
    *,
    config: PolicyConfig,
    perf: PerfModel,
    noise: Noise,
) -> Placement:
    """The best placement on workers that may take work.

    `pools`: those of the request's model in `table`; `hits`: for each of them. Raises NoWorker
    when nobody can take the request.
    """
    kept = candidate_pools(table, pools, request)
    placements = [_place_in_pool(pool, request, hits[i], config, perf, noise) for i, pool in kept]
    if len(placements) == 1:
        return placements[0]
    return min(placements, key=lambda placement: placement.score)


@dataclass(frozen=True, slots=True)
class CostPolicy:
    """`place` with what it needs beside the request."""

    config: PolicyConfig
    perf: PerfModel
    noise: Noise

    def place(
        self,
        table: WorkerTable,
        pools: Sequence[Pool],
        hits: Sequence[Hits],
        request: PlacementRequest,
    ) -> Placement:
        return place(
            table, pools, hits, request, config=self.config, perf=self.perf, noise=self.noise
        )


def candidate_pools(
    table: WorkerTable, pools: Sequence[Pool], request: PlacementRequest
) -> list[tuple[int, Pool]]:
    """Pools of the workers that can take the request, with their places in `pools`.

    Workers to avoid are left out unless there are no others. Raises NoWorker.
    """
    num_tokens, avoid = request.num_prompt_tokens, request.avoid
    if not avoid and (not pools or num_tokens < min([pool.min_model_len for pool in pools])):
        kept = list(enumerate(pools))
    else:
        kept = _cut(pools, num_tokens, avoid) or _cut(pools, num_tokens, frozenset())
    if not kept:
        raise NoWorker(_why_none(table, pools, request))
    return kept


def _cut(
    pools: Sequence[Pool], num_tokens: int, avoid: frozenset[WorkerId]
) -> list[tuple[int, Pool]]:
    cut = [pool.without(num_prompt_tokens=num_tokens, avoid=avoid) for pool in pools]
    return [(i, pool) for i, pool in enumerate(cut) if pool is not None]


def _place_in_pool(
    pool: Pool,
    request: PlacementRequest,
    hits: Hits,
    config: PolicyConfig,
    perf: PerfModel,
    noise: Noise,
) -> Placement:
    num_prefill = pool.num_prefill
    sheet = score_prefill(pool, request, hits.match, hits.held, config, perf)
    prefill, decode = slice(0, num_prefill), slice(num_prefill, pool.num_candidates)
    choice = Choice(sheet, pool, config, perf, noise)
    if not num_prefill or not pool.num_decode or request.max_tokens == 1:
        workers = prefill if num_prefill else decode
        score_decode(sheet, pool, workers, config)
        _prefer_last(sheet, pool, config)
        reason = "a single token is asked for"
        if not pool.num_decode:
            reason = "no decode worker answers"
        elif not num_prefill:
            reason = "no prefill worker answers"
        return choice.alone(workers, reason)
    score_decode(sheet, pool, decode, config)
    _prefer_last(sheet, pool, config)
    return choice.pair(bool(config.local_prefill_max_tokens) and score_local(sheet, config))


def _prefer_last(sheet: Sheet, pool: Pool, config: PolicyConfig) -> None:
    """The hint of session affinity."""
    if not config.affinity_s:
        return
    for worker_id in sheet.request.last_workers:
        position = pool.position.get(worker_id)
        if position is None:
            continue
        if position < pool.num_prefill:
            sheet.prefill_cost[position] -= config.affinity_s
        elif sheet.generators.start == pool.num_prefill:
            sheet.decode_cost[position - pool.num_prefill] -= config.affinity_s


def _why_none(table: WorkerTable, pools: Sequence[Pool], request: PlacementRequest) -> str:
    if pools:
        longest = max(int(pool.max_model_lens.max()) for pool in pools)
        return (
            f"no worker takes {request.num_prompt_tokens} tokens; "
            f"the longest context served now is {longest}"
        )
    known = [row for row in table.rows() if row.info.model_name == request.model]
    if not known:
        return f"no worker for model {request.model!r} is connected; try again in a moment"
    num_lost = sum(1 for row in known if row.is_lost)
    num_unhealthy = sum(1 for row in known if row.book.is_unhealthy and not row.is_lost)
    num_draining = len(known) - num_lost - num_unhealthy
    return (
        f"none of {len(known)} workers for model {request.model!r} takes work now: "
        f"{num_lost} do not answer, {num_unhealthy} are unhealthy, {num_draining} are draining; "
        "try again in a moment"
    )
