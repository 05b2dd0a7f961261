"""One decision, taken apart: what was seen, what each formula made of it, and why it came out so.

    records ─► replay up to the one asked for ─► Explanation (plain values and sentences)

Pure. Does not know: files, terminals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from baton.core.errors import ConfigError
from baton.core.worker_info import Role
from services.planner.autoscale import (
    HIGH_KV_USAGE,
    Decision,
    PoolDecision,
    PoolState,
    at_rate,
    catch_up_per_s,
    keep_window_s,
)
from services.planner.autoscale_config import AutoscaleConfig, PoolLimits
from services.planner.autoscaler_state import AutoscalerState
from services.planner.decision_record import Record, Replay
from services.planner.demand import (
    Load,
    decode_batch,
    decode_workers,
    erlang_c,
    prefill_s,
    prefill_workers,
    ttft_miss_share,
)


@dataclass(frozen=True, slots=True)
class PrefillFigures:
    """What the prefill formula goes through, for one rate."""

    rate_per_s: float
    service_s: float
    """Of one mean prompt."""
    offered: float
    """Workers that would be busy without any waiting."""
    num_workers: int
    wait_share: float
    """Of requests that wait at all with so many workers (Erlang C)."""
    miss_share: float
    """Of requests that miss the target with so many."""
    miss_share_less: float | None
    """With one worker less; None where that keeps no queue from growing."""


@dataclass(frozen=True, slots=True)
class DecodeFigures:
    """What the decode formula goes through, for one rate."""

    rate_per_s: float
    batch_by_pace: float
    batch_by_memory: float
    batch: float
    step_s: float
    num_sequences: float
    """In the pool at once, by Little's law."""
    num_workers: int


@dataclass(frozen=True, slots=True)
class PoolExplanation:
    """One pool."""

    role: Role
    state: PoolState
    decision: PoolDecision
    limits: PoolLimits
    window_s: float
    window_since_s: float | None
    """Age of the moment that needed most within the window; None when it is not known."""
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The record, its figures, and whether it can be made once more."""

    record: Record
    catch_up_per_s: float
    """Planned for now on top of what arrives, for the queue to go."""
    prefill_now: PrefillFigures
    prefill_soon: PrefillFigures
    decode_now: DecodeFigures
    decode_soon: DecodeFigures
    prefill: PoolExplanation
    decode: PoolExplanation
    sentences: tuple[str, ...]
    """Of both pools together: budget, role changes."""
    replayed: Decision | None
    """None when no state before it is in the file."""
    num_equal: int
    """Decisions replayed that came out as logged, this one included if it did."""
    num_different: int


def explain(records: Iterable[Record], number: int) -> Explanation:
    """The decision `number`, after all before it in `records` have been replayed.

    Raises ConfigError naming what there is when it is not among them.
    """
    replay = Replay()
    first: int | None = None
    last: int | None = None
    for record in records:
        first = record.number if first is None else first
        last = record.number
        state = None
        if record.number == number and replay.autoscaler is not None:
            state = replay.autoscaler.state()
        decision = replay.step(record)
        if record.number == number:
            return _explanation(record, record.state or state, decision, replay)
    if first is None:
        raise ConfigError("the decision log is empty: nothing has been decided yet")
    raise ConfigError(f"there is no decision {number}; the log holds {first} to {last}")


def _explanation(
    record: Record, before: AutoscalerState | None, replayed: Decision | None, replay: Replay
) -> Explanation:
    config, decision = record.config, record.decision
    seen = at_rate(record.seen, decision.forecast.now)
    catch_up = catch_up_per_s(seen, config, record.used.prefill)
    rates = (seen.load.rate_per_s + catch_up, decision.forecast.rate_per_s)
    prefill_factor = config.headroom * decision.prefill.margin
    decode_factor = config.headroom * decision.decode.margin
    prefill_now, prefill_soon = (_prefill(record, rate * prefill_factor) for rate in rates)
    decode_now, decode_soon = (_decode(record, rate * decode_factor) for rate in rates)
    return Explanation(
        record,
        catch_up,
        prefill_now,
        prefill_soon,
        decode_now,
        decode_soon,
        _pool(record, Role.PREFILL, before),
        _pool(record, Role.DECODE, before),
        tuple(_common(record)),
        replayed,
        replay.num_equal,
        replay.num_different,
    )


def _prefill(record: Record, rate_per_s: float) -> PrefillFigures:
    config, model = record.config, record.used.prefill
    load = dataclasses.replace(record.seen.load, rate_per_s=rate_per_s)
    seconds = prefill_s(model, load)
    offered = rate_per_s * seconds
    num = prefill_workers(model, load, ttft_s=config.ttft_s, share=config.share)
    less = None
    if num - 1 > offered:
        less = ttft_miss_share(model, load, num - 1, config.ttft_s)
    return PrefillFigures(
        rate_per_s,
        seconds,
        offered,
        num,
        erlang_c(num, offered) if num > offered else 0.0,
        ttft_miss_share(model, load, num, config.ttft_s) if num else 0.0,
        less,
    )


def _decode(record: Record, rate_per_s: float) -> DecodeFigures:
    config, model = record.config, record.used.decode
    load: Load = dataclasses.replace(record.seen.load, rate_per_s=rate_per_s)
    most = decode_batch(model, load, itl_s=config.itl_s)
    return DecodeFigures(
        rate_per_s,
        most.by_pace,
        most.by_memory,
        most.batch,
        most.step_s,
        rate_per_s * max(0.0, load.output_tokens - 1) * most.step_s,
        decode_workers(model, load, itl_s=config.itl_s),
    )


def _pool(record: Record, role: Role, before: AutoscalerState | None) -> PoolExplanation:
    config, seen, decision = record.config, record.seen, record.decision
    state, of_pool, limits = (
        (seen.prefill, decision.prefill, config.prefill)
        if role is Role.PREFILL
        else (seen.decode, decision.decode, config.decode)
    )
    keep_s = keep_window_s(config, record.models.prefill, record.models.decode)
    memory = None if before is None else before.prefill if role is Role.PREFILL else before.decode
    since = None
    if memory is not None:
        moments = zip(memory.needed_s, memory.needed, strict=True)
        ages = [seen.now_s - at_s for at_s, num in moments if num >= of_pool.kept_for > 0]
        since = max((age for age in ages if age <= keep_s), default=0.0)
    return PoolExplanation(
        role,
        state,
        of_pool,
        limits,
        keep_s,
        since,
        tuple(_why(role, state, of_pool, limits, config, keep_s, since)),
    )


def _why(
    role: Role,
    state: PoolState,
    decision: PoolDecision,
    limits: PoolLimits,
    config: AutoscaleConfig,
    keep_s: float,
    since: float | None,
) -> Iterable[str]:
    have = state.num_ready + state.num_starting
    verb = "stays at" if decision.desired == have else "goes from"
    to = "" if decision.desired == have else f" to {decision.desired}"
    yield f"The {role.value} pool {verb} {have}{to}: {decision.reason}."
    if decision.kept_for > max(decision.needed_now, decision.needed_soon):
        ago = "" if not since else f", {since:.0f} s ago"
        yield (
            f"Within the last {keep_s:.0f} s it needed {decision.kept_for}{ago} "
            f"(planned {config.shrink_headroom:g} times as high as for now): with fewer it would "
            "have missed its target then."
        )
    if decision.margin > 1.005:
        yield (
            f"Requests missed the target although the plan said otherwise, so {decision.margin:.2f}"
            " times the load is planned for; that fades."
        )
    if role is Role.DECODE and state.kv_usage > HIGH_KV_USAGE:
        yield f"KV memory is {100 * state.kv_usage:.0f} % full, so one more is needed."
    if decision.desired == limits.max_workers:
        yield f"It is at max_workers ({limits.max_workers})."
    elif decision.desired == limits.min_workers:
        yield f"It is at min_workers ({limits.min_workers})."


def _common(record: Record) -> Iterable[str]:
    config, decision = record.config, record.decision
    used = (
        decision.prefill.desired * config.prefill.devices_per_worker
        + decision.decode.desired * config.decode.devices_per_worker
    )
    if decision.is_at_budget:
        yield f"More is needed than the {config.max_devices} devices of the budget allow."
    else:
        yield f"Both pools together are to use {used} of {config.max_devices} devices."
    if num := decision.num_role_changes:
        lender, borrower = ("prefill", "decode") if num > 0 else ("decode", "prefill")
        workers = "1 worker goes" if abs(num) == 1 else f"{abs(num)} workers go"
        yield (
            f"{workers} over from {lender} to {borrower}: {lender} can spare as much now, "
            f"{borrower} is short, and a change of role takes seconds."
        )
    elif config.can_change_roles:
        yield "No worker changes its role."
