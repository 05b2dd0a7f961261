"""The Prometheus series of a planner, which has a /metrics of its own. Data only.

Apart from those of routers (`baton.core.metrics`): a router must not show a planner's zeros. What a
planner has not decided or seen yet is not there, since a wrong number of workers would be obeyed.
"""

from __future__ import annotations

from baton.core.metrics import Kind, Series

POOLS = (("pool", ("prefill", "decode")),)
STATES = ("ready", "starting", "draining")
DIRECTIONS = ("up", "down", "hold")
STAGES = ("read", "decide", "act")

DESIRED_WORKERS = Series(
    "baton_planner_desired_workers", Kind.GAUGE, "Workers that a pool is to have.", ("pool",)
)
POOL_WORKERS = Series(
    "baton_planner_workers",
    Kind.GAUGE,
    "Workers that a pool has, by state: ready, starting, draining.",
    ("pool", "state"),
)
PLANNER_PREDICTION_ERROR = Series(
    "baton_planner_prediction_error_ratio",
    Kind.GAUGE,
    "Mean share by which measured seconds of prompts (prefill) and decode steps (decode_step) "
    "differ from what the planner's models predict.",
    ("term",),
)
CORRECTION = Series(
    "baton_planner_correction_ratio",
    Kind.GAUGE,
    "What the planner multiplies the seconds of its models by, from what was measured.",
    ("term",),
)
ARRIVALS = Series(
    "baton_planner_arrivals_per_second",
    Kind.GAUGE,
    "Requests per second: now, and predicted for when a new worker would be ready.",
    ("when",),
)
PLANNER_ATTAINMENT = Series(
    "baton_planner_attainment_ratio",
    Kind.GAUGE,
    "Share of the last requests (20 or more) that kept a target: ttft, itl.",
    ("target",),
)
MARGIN = Series(
    "baton_planner_margin_ratio",
    Kind.GAUGE,
    "By how much more than predicted a pool is planned for, because targets were missed.",
    ("pool",),
)
DECISIONS = Series(
    "baton_planner_decisions_total",
    Kind.COUNTER,
    "Decisions by pool and direction: up, down or hold, beside the workers that are there.",
    ("pool", "direction"),
    values=(*POOLS, ("direction", DIRECTIONS)),
)
ROLE_CHANGES = Series(
    "baton_planner_role_changes_total",
    Kind.COUNTER,
    "Workers decided to go over to a pool from the other one.",
    ("pool",),
    values=POOLS,
)
DEVICES = Series(
    "baton_planner_devices",
    Kind.GAUGE,
    "Devices: desired, by all workers that both pools are to have; budget, what they may use.",
    ("kind",),
)
AT_BUDGET = Series(
    "baton_planner_at_budget", Kind.GAUGE, "1 while more is needed than the budget allows."
)
DECIDED_AT = Series(
    "baton_planner_last_decision_timestamp_seconds",
    Kind.GAUGE,
    "Unix time of the last decision; 0 before the first one.",
)
ROUTERS = Series(
    "baton_planner_routers", Kind.GAUGE, "Router copies whose statistics were read last."
)
FAILURES = Series(
    "baton_planner_failures_total",
    Kind.COUNTER,
    "What went wrong: routers that gave no statistics (read), decisions that could not be made "
    "(decide), orders that could not be given (act).",
    ("stage",),
    values=(("stage", STAGES),),
)

PLANNER_SERIES: tuple[Series, ...] = tuple(
    v for v in list(globals().values()) if isinstance(v, Series)
)
