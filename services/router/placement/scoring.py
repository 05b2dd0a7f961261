"""What a request would cost on each worker of a pool, as arrays over its candidates. Seconds.

    prefill  queue + move + compute + lost credit
             queue    tokens queued before it, at the worker's pace
             move     restoring from tiers or fetching from a peer, on the cheapest way
             compute  fixed + token * uncached + pair * (total^2 - cached^2) / 2
             lost     what the cached prefix saves, times queue / (queue + overlap_half): a hot
                      worker's cache counts less the longer its queue is
    decode   output * (itl + slowdown_weight * batch * itl's growth by this request)
             + shortage_factor * token * missing KV + waiting for a slot
    hand-off handoff + latency + max(move of the KV - (move + compute + lost), its last chunk's)
    local    prefill and decode of one decode worker + slowdown_weight * batch * compute

Compute comes from `PerfModel`, hand-off and move from measured links. All of it is one pass of
vector arithmetic; what does not depend on the request is kept with the pool.

Pure. Does not know: which worker is chosen, time, sessions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from baton.core.worker_info import Role
from services.router.index.prefix_match import PrefixMatch
from services.router.placement.candidates import Floats, Pool
from services.router.placement.load_book import AVAILABLE, LEASES, QUEUED, RESIDENT, SEQUENCES
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import PlacementRequest
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.prefix_source import Ways, ways_to_prefix

NUM_PREFILL_SPEEDS = 4
"""fixed, token, half a pair, queued token; then those of decoding: fixed, sequence, KV token."""
NUM_SPEEDS = 7
NOTHING: Floats = np.empty(0)


@dataclass(slots=True, eq=False)
class Sheet:
    """All terms of the candidates of one pool, for one request. Arrays over candidates, but for
    those of decode terms: over `generators`."""

    pool: Pool
    request: PlacementRequest
    loads: Floats
    """[column, member]"""
    speeds: Floats
    """[speed, candidate]"""
    ways: Ways | None
    """None when no block of the prompt is cached anywhere."""
    way: NDArray[np.intp] | None
    """The cheapest one of each candidate, as its position in the arrays of `ways`."""
    cached: Floats
    """Tokens that need not be computed, on that way."""
    queue_s: Floats
    move_s: Floats
    compute_s: Floats
    work_s: Floats
    """Move, compute and the credit that is lost to the queue."""
    prefill_cost: Floats
    generators: slice = field(init=False)
    """Candidates whose decode terms are there."""
    decode_cost: Floats = field(init=False)
    itl_s: Floats = field(init=False)
    missing: Floats = field(init=False)
    """Tokens of KV there are no blocks for."""
    local_cost: Floats = field(init=False)
    """Infinite where a local prefill is not allowed; empty where it is nowhere."""


def score_prefill(
    pool: Pool,
    request: PlacementRequest,
    match: PrefixMatch,
    held: PrefixMatch,
    config: PolicyConfig,
    perf: PerfModel,
) -> Sheet:
    """The prefill half of a sheet. `match` also counts what workers have only been sent, `held`
    what they have said."""
    num_tokens, loads, speeds = request.num_prompt_tokens, pool.loads(), _speeds(pool, perf)
    whole = np.array((1.0, num_tokens, num_tokens * num_tokens)) @ speeds[:3]
    ways = None
    if match.lengths.size and num_tokens > pool.layout.block_size:
        expected = lengths_in_pool(match, pool)
        known = expected if held is match else lengths_in_pool(held, pool)
        ways = ways_to_prefix(pool, expected, known, loads[LEASES], num_tokens, config)
    queue_s = loads[QUEUED, : pool.num_candidates] * speeds[3]
    way, compute_s = None, whole
    if ways is None:
        cached = move_s = pool.nothing
        work_s = whole
    else:
        way, move_s, compute_s = _cheapest(ways, whole, speeds, pool)
        cached = ways.tokens.take(way)
        work_s = move_s + compute_s
        if config.overlap_half_s:
            lost = whole - work_s
            lost *= queue_s
            lost /= queue_s + config.overlap_half_s
            work_s += lost
    cost = queue_s + work_s
    if config.work_weight:
        cost += config.work_weight * compute_s
    return Sheet(
        pool, request, loads, speeds, ways, way, cached, queue_s, move_s, compute_s, work_s, cost
    )


def _cheapest(
    ways: Ways, whole: Floats, speeds: Floats, pool: Pool
) -> tuple[NDArray[np.intp], Floats, Floats]:
    """(flat position in the ways, move, compute) of each candidate's cheapest way."""
    compute_s = speeds[2] * ways.tokens
    compute_s += speeds[1]
    compute_s *= ways.tokens
    np.subtract(whole, compute_s, out=compute_s)
    at = (compute_s + ways.move_s).argmin(axis=0)
    at *= pool.num_candidates
    at += pool.numbers
    return at, ways.move_s.take(at), compute_s.take(at)


def score_decode(sheet: Sheet, workers: slice, config: PolicyConfig) -> None:
    """Fill in the decode terms of `workers`."""
    request, loads = sheet.request, sheet.loads
    speeds, batch = sheet.speeds[:, workers], loads[SEQUENCES, workers]
    weight, output = config.slowdown_weight, min(request.max_tokens, config.expected_output_tokens)
    grown = request.num_prompt_tokens + output / 2
    # itl = alone + sequence * batch + kv_token * resident; with what the others are slowed down by,
    # each sequence counts `per_other` instead.
    alone, per_other = (
        np.array(((1.0, 1.0, grown), (0.0, 1.0 + weight, weight * grown))) @ speeds[4:]
    )
    alone += speeds[6] * loads[RESIDENT, workers]
    itl_s = speeds[5] * batch
    itl_s += alone
    cost = per_other * batch
    cost += alone
    cost *= output
    # What is queued there to be prefilled holds up the batch that the request joins.
    cost += sheet.queue_s[workers]
    missing = sheet.pool.nothing[workers]
    available, needed = loads[AVAILABLE, workers], request.num_prompt_tokens + output
    if available.min() < needed:
        missing = np.maximum(needed - available - _on_device(sheet, workers), 0.0)
        cost += missing * speeds[1] * config.shortage_factor
    if batch.max() >= sheet.pool.min_num_seqs:
        slots = sheet.pool.max_num_seqs[workers]
        cost += np.maximum(batch - slots + 1.0, 0.0) * itl_s * (output / slots)
    sheet.generators, sheet.itl_s, sheet.missing = workers, itl_s, missing
    sheet.decode_cost, sheet.local_cost = cost, NOTHING


def score_local(sheet: Sheet, config: PolicyConfig) -> bool:
    """Fill in the cost of all on one decode worker; whether it is allowed anywhere."""
    decode = sheet.generators
    cached = sheet.cached[decode]
    enough = sheet.request.num_prompt_tokens - config.local_prefill_max_tokens
    if cached.max() < enough:
        return False
    queued, batch = sheet.loads[QUEUED, decode], sheet.loads[SEQUENCES, decode]
    local = sheet.compute_s[decode] * batch
    local *= config.slowdown_weight
    local += sheet.prefill_cost[decode]
    local += sheet.decode_cost
    is_barred = cached < enough
    is_barred |= queued > config.local_prefill_max_queued_tokens
    is_barred |= sheet.missing > 0
    local[is_barred] = np.inf
    sheet.local_cost = local
    return not is_barred.all()


def score_handoff(sheet: Sheet, config: PolicyConfig) -> Floats:
    """[prefill, decode] what moving the KV adds to a pair."""
    pool, layout = sheet.pool, sheet.pool.layout
    num_tokens = sheet.request.num_prompt_tokens
    tail = min(num_tokens, config.handoff_tail_tokens)
    # Each is max(move - work, move of the tail) + latency, with the tail's move taken out. Less
    # work hides less of the move, and never by more than it saves.
    to_move = num_tokens - tail - _on_device(sheet, sheet.generators)
    handoff = pool.pair_seconds * (to_move * layout.token_bytes)
    handoff -= sheet.work_s[: pool.num_prefill, None]
    np.maximum(handoff, 0.0, out=handoff)
    handoff += pool.pair_tail(tail)
    return handoff


def _on_device(sheet: Sheet, workers: slice) -> Floats | float:
    """Tokens of the prompt in the pools of `workers`: a hand-off skips those."""
    return 0.0 if sheet.ways is None else sheet.ways.tokens[0, workers]


def lengths_in_pool(match: PrefixMatch, pool: Pool) -> NDArray[np.int32]:
    """[tier, member]"""
    lengths = match.lengths
    if lengths.shape[1] <= pool.max_slot:
        # Workers that came after the match hold nothing of it.
        wide = np.zeros((lengths.shape[0], pool.max_slot + 1), np.int32)
        wide[:, : lengths.shape[1]] = lengths
        lengths = wide
    taken: NDArray[np.int32] = lengths.take(pool.slots, axis=1)
    return taken


def _speeds(pool: Pool, perf: PerfModel) -> Floats:
    """[speed, candidate], worked out anew when the model has learned."""
    if pool.speeds is None or pool.speeds_version != perf.version:
        ids = [member.info.worker_id for member in pool.members[: pool.num_candidates]]
        speeds = np.empty((NUM_SPEEDS, pool.num_candidates))
        for role, workers in (
            (Role.PREFILL, slice(0, pool.num_prefill)),
            (Role.DECODE, slice(pool.num_prefill, None)),
        ):
            prefill, decode = perf.prefill_speed(role), perf.decode_speed(role)
            role_speeds = (
                prefill.fixed_s, prefill.token_s, prefill.pair_s / 2, prefill.queued_token_s,
                *decode,
            )  # fmt: skip
            speeds[:, workers] = np.array(role_speeds)[:, None]
        speeds[:NUM_PREFILL_SPEEDS] *= [perf.prefill_ratio(worker_id) for worker_id in ids]
        speeds[NUM_PREFILL_SPEEDS:] *= [perf.itl_ratio(worker_id) for worker_id in ids]
        pool.speeds, pool.speeds_version = speeds, perf.version
    return pool.speeds
