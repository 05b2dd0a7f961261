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

Speeds come from `PerfModel`, hand-off and move from measured links. A call into numpy takes about
as long for one worker as for a hundred, so there are few: a sum of the request's figures times a
worker's is one product with a short vector, extremes are found by their place, and what a total
is made of is left to the `Sheet`.

Pure. Does not know: which worker is chosen, time, sessions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.router.index.prefix_match import PrefixMatch
from services.router.placement.candidates import (
    AVAILABLE_ROW,
    BATCH_ROW,
    NUM_TIMED_ROWS,
    QUEUED_ROW,
    Pool,
)
from services.router.placement.perf_model import PerfModel
from services.router.placement.placement import PlacementRequest
from services.router.placement.policy_config import PolicyConfig
from services.router.placement.prefix_source import Ways, ways_to_prefix
from services.router.placement.sheet import NOTHING, Savings, Sheet
from services.router.placement.speeds import Floats, Speeds


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
    num_tokens, speeds = request.num_prompt_tokens, pool.speed_book.speeds(perf)
    loads = pool.cost_loads()
    load_s = loads[:NUM_TIMED_ROWS] * speeds.load
    queue_s = load_s[QUEUED_ROW]
    whole_s = np.array((1.0, num_tokens, num_tokens * num_tokens)).dot(speeds.prompt)
    work_s, ways, savings = whole_s, None, None
    if match.longest and num_tokens > pool.layout.block_size:
        expected = lengths_in_pool(match, pool)
        known = expected if held is match else lengths_in_pool(held, pool)
        ways = ways_to_prefix(pool, expected, known, num_tokens, config)
        if ways is not None:
            savings = _savings(ways, speeds)
            work_s = whole_s - _kept_s(savings.best_s, queue_s, config.overlap_half_s)
    sheet = Sheet(
        pool.members, pool.num_prefill, request, loads, load_s, speeds, whole_s, work_s,
        queue_s + work_s, ways, savings,
    )  # fmt: skip
    if config.work_weight:
        sheet.prefill_cost += config.work_weight * sheet.compute_s()
    return sheet


def _savings(ways: Ways, speeds: Speeds) -> Savings:
    by_way: list[Floats] = []
    for blocks, move_s in ways.ways:
        saved_s = speeds.saved_s(blocks)
        if move_s is not None:
            saved_s -= move_s
        by_way.append(saved_s)
    best_s = by_way[0]
    for saved_s in by_way[1:]:
        best_s = np.maximum(best_s, saved_s)
    return Savings(by_way, best_s)


def _kept_s(saved_s: Floats, queue_s: Floats, half_s: float) -> Floats:
    """Of what a prefix saves, the part that the queue leaves."""
    if not half_s:
        return saved_s
    lost_s = saved_s * queue_s
    lost_s /= queue_s + half_s
    return np.subtract(saved_s, lost_s, out=lost_s)


def score_decode(sheet: Sheet, pool: Pool, workers: slice, config: PolicyConfig) -> None:
    """Fill in the decode terms of `workers`."""
    request, weight = sheet.request, config.slowdown_weight
    output = min(request.max_tokens, config.expected_output_tokens)
    grown = request.num_prompt_tokens + output / 2
    # itl = fixed + sequence * (batch + 1) + kv_token * (resident + grown). The growth by this
    # request, sequence + kv_token * grown, is what each of the batch waits longer. What is queued
    # there to be prefilled holds up the batch that the request joins.
    cost = np.array((output, output, output * grown)).dot(sheet.speeds.step)
    by_load = (1.0, output * (1.0 + weight), output, output * weight * grown)
    cost += np.array(by_load).dot(sheet.load_s)
    cost = cost[workers]
    sheet.generators, sheet.grown_tokens, sheet.decode_cost = workers, grown, cost
    sheet.missing = sheet.local_cost = NOTHING
    available, needed = sheet.loads[AVAILABLE_ROW, workers], request.num_prompt_tokens + output
    if available.item(available.argmin()) < needed:
        missing = needed - available
        if sheet.ways is not None:
            missing -= sheet.on_device(workers) * pool.layout.block_size
        sheet.missing = missing = np.maximum(missing, 0.0)
        cost += missing * sheet.speeds.prompt[1, workers] * config.shortage_factor
    batch = sheet.loads[BATCH_ROW, workers]
    if batch.item(batch.argmax()) >= pool.min_num_seqs:
        slots = pool.max_num_seqs[workers]
        cost += np.maximum(batch - slots + 1.0, 0.0) * sheet.itl_s() * (output / slots)


def score_local(sheet: Sheet, config: PolicyConfig) -> bool:
    """Fill in the cost of all on one decode worker; whether it is allowed anywhere."""
    decode = sheet.generators
    is_allowed = sheet.loads[QUEUED_ROW, decode] <= config.local_prefill_max_queued_tokens
    if not is_allowed.item(is_allowed.argmax()):
        return False
    least_tokens = sheet.request.num_prompt_tokens - config.local_prefill_max_tokens
    if least_tokens > 0:
        cached = sheet.cached()
        if cached is None:
            return False
        is_allowed &= cached[decode] >= least_tokens / sheet.block_size
    if sheet.missing.size:
        is_allowed &= sheet.missing <= 0
    if not is_allowed.item(is_allowed.argmax()):
        return False
    local = sheet.compute_s()[decode] * sheet.loads[BATCH_ROW, decode]
    local *= config.slowdown_weight
    local += sheet.prefill_cost[decode]
    local += sheet.decode_cost
    local[~is_allowed] = np.inf
    sheet.local_cost = local
    return True


def score_pairs(
    sheet: Sheet, pool: Pool, prefill_cost: Floats, decode_cost: Floats, config: PolicyConfig
) -> Floats:
    """[prefill, decode]: these costs together, with what moving the KV adds to them."""
    num_tokens, cost = sheet.request.num_prompt_tokens, prefill_cost[:, None]
    tail = min(num_tokens, config.handoff_tail_tokens)
    num_bytes: float | Floats = (num_tokens - tail) * pool.token_bytes
    if sheet.ways is not None:
        num_bytes -= sheet.on_device(sheet.generators) * (pool.layout.block_size * pool.token_bytes)
    # max(move - work, 0) + cost, with the tail's move taken out of both. Less work hides less of
    # the move, and never by more than it saves.
    total: Floats = pool.pair_seconds * num_bytes
    total += cost - sheet.work_s[: pool.num_prefill, None]
    np.maximum(total, cost, out=total)
    total += pool.pair_tail(tail)
    total += decode_cost
    return total


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
