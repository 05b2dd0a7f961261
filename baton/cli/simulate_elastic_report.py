"""How `baton simulate --autoscale` looks: what requests got, how the pools moved, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from baton.cli.simulate_report import print_figures, run_json
from baton.core.worker_info import Role
from baton.simulator.run_report import RunReport
from services.planner.autoscale import Decision
from services.planner.elastic import ElasticRun, RunOrder, Sample, num_turns
from services.planner.objective import Objective
from services.planner.orders import OrderKind
from services.planner.plain import to_plain

MAX_ROWS = 20


def elastic_json(
    report: RunReport,
    elastic: ElasticRun,
    decisions: Sequence[Decision],
    name: str,
    price: float | None,
) -> dict[str, Any]:
    return {
        **run_json(report, name, price),
        "samples": to_plain(tuple(elastic.samples)),
        "orders": to_plain(tuple(elastic.orders)),
        "decisions": to_plain(tuple(decisions)),
        "turns": {role.value: num_turns(elastic.samples, role) for role in Role},
    }


def print_elastic(
    report: RunReport,
    elastic: ElasticRun,
    decisions: Sequence[Decision],
    name: str,
    objective: Objective,
    price: float | None,
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    print_figures(console, report, name, objective, price)
    if elastic.samples:
        console.print(_pools(elastic.samples))
    counts = [
        f"{sum(o.order.kind is kind for o in elastic.orders)} {text}"
        for kind, text in (
            (OrderKind.START, "workers started"),
            (OrderKind.DRAIN, "drained"),
            (OrderKind.CHANGE_ROLE, "changes of role"),
        )
    ]
    console.print(", ".join(counts))
    if elastic.orders:
        console.print(_changes(elastic.orders, decisions))


def _pools(samples: Sequence[Sample]) -> Table:
    table = Table("pool", "least", "mean", "most", "turns", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for role in (Role.PREFILL, Role.DECODE):
        values = [s.num_prefill if role is Role.PREFILL else s.num_decode for s in samples]
        mean = sum(values) / len(values)
        table.add_row(
            role.value, str(min(values)), f"{mean:.1f}", str(max(values)),
            str(num_turns(samples, role)),
        )  # fmt: skip
    return table


def _changes(orders: Sequence[RunOrder], decisions: Sequence[Decision]) -> Table:
    """One row a decision and pool that changed something, with its reason."""
    table = Table("second", "req/s soon", "pool", "to", "why", box=box.SIMPLE_HEAD, pad_edge=False)
    at = {decision.now_s: decision for decision in decisions}
    rows = list(dict.fromkeys((o.now_s, o.order.role) for o in orders))
    for now_s, role in rows[:MAX_ROWS]:
        decision = at[now_s]
        pool = decision.prefill if role is Role.PREFILL else decision.decode
        table.add_row(
            f"{now_s:.0f}", f"{decision.forecast.rate_per_s:.1f}", role.value, str(pool.desired),
            pool.reason,
        )  # fmt: skip
    if len(rows) > MAX_ROWS:
        table.add_row("", "", "", "", f"{len(rows) - MAX_ROWS} more with --json")
    return table
