"""A simulated run in figures: what requests got, what workers did, and both over time.

Does not know: how figures are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.simulator.outcome import Outcome, Summary, summarize
from services.router.admission.slo import SloTargets

NUM_WINDOWS = 60


@dataclass(frozen=True, slots=True)
class Window:
    """Some of the run's time; requests count where they arrived."""

    start_s: float
    rate_per_s: float
    attainment: float | None
    """Share that kept all targets; None without requests."""


@dataclass(frozen=True, slots=True)
class WorkerUse:
    worker_id: str
    busy_share: float
    num_prompts: int
    num_decoded: int


@dataclass(frozen=True, slots=True)
class RunReport:
    summary: Summary
    attainment: float
    """Share of all requests, refused ones included, that kept all targets."""
    refused_share: float
    goodput_per_s: float
    """Of requests that kept their targets."""
    output_tokens_per_s: float
    device_hours: float
    moved_bytes: int
    """KV that went from worker to worker: hand-offs and prefixes read elsewhere."""
    moved_bytes_per_s: float
    workers: tuple[WorkerUse, ...]
    windows: tuple[Window, ...]


def run_report(
    outcomes: Sequence[Outcome],
    busy_s: dict[str, float],
    targets: SloTargets,
    *,
    num_devices: int = 0,
    device_s: float | None = None,
    kv_bytes_per_token: int = 0,
) -> RunReport:
    """`busy_s`: seconds that each worker spent in steps. `device_s`: paid for, where that is not
    `num_devices` all the time. Raises ValueError without outcomes."""
    if not outcomes:
        raise ValueError("nothing was simulated")
    summary = summarize(outcomes)
    span_s = max(summary.span_s, 1e-9)
    moved = kv_bytes_per_token * sum(o.num_handed_tokens + o.num_fetched_tokens for o in outcomes)
    num_met = sum(keeps(outcome, targets) for outcome in outcomes)
    return RunReport(
        summary,
        attainment=num_met / len(outcomes),
        refused_share=sum(o.refused_s is not None for o in outcomes) / len(outcomes),
        goodput_per_s=num_met / span_s,
        output_tokens_per_s=sum(o.num_output_tokens for o in outcomes) / span_s,
        device_hours=(num_devices * span_s if device_s is None else device_s) / 3600,
        moved_bytes=moved,
        moved_bytes_per_s=moved / span_s,
        workers=tuple(_use(name, seconds / span_s, outcomes) for name, seconds in busy_s.items()),
        windows=tuple(_windows(outcomes, targets)),
    )


def keeps(outcome: Outcome, targets: SloTargets) -> bool:
    """Whether it ended within all targets; a single token has no ITL to miss."""
    return bool(outcome.last_token_s) and outcome.against(targets).is_met is not False


def _use(name: str, busy_share: float, outcomes: Sequence[Outcome]) -> WorkerUse:
    return WorkerUse(
        name,
        busy_share,
        num_prompts=sum((o.prefill or o.decode) == name for o in outcomes),
        num_decoded=sum(o.decode == name for o in outcomes),
    )


def _windows(outcomes: Sequence[Outcome], targets: SloTargets) -> list[Window]:
    end_s = max(o.arrived_s for o in outcomes)
    length_s = max(end_s / NUM_WINDOWS, 1e-9)
    arrived, met = [0] * NUM_WINDOWS, [0] * NUM_WINDOWS
    for outcome in outcomes:
        i = min(NUM_WINDOWS - 1, int(outcome.arrived_s / length_s))
        arrived[i] += 1
        met[i] += keeps(outcome, targets)
    return [
        Window(i * length_s, arrived[i] / length_s, met[i] / arrived[i] if arrived[i] else None)
        for i in range(NUM_WINDOWS)
    ]
