"""Router and planner: what routers decide, whom they avoid, how well they predict."""

from __future__ import annotations

from tools.dashboards.model import Board, Panel, Query, Row, Variable, View, lines, stat

_CLASS = 'SEL,slo_class=~"$slo_class"'
_QUEUED = f"sum by (slo_class) (baton_admission_queue_requests{{{_CLASS}}})"


def _rate(series: str, by: str, matchers: str = "") -> Query:
    expr = f"sum by ({by}) (rate({series}{{SEL{matchers}}}[$__rate_interval]))"
    return Query(expr, " ".join(f"{{{{{label}}}}}" for label in by.split(", ")))


_COPIES = Row(
    "Routers",
    (
        stat("Routers", "Live copies, as they count each other.", "none",
             "min(baton_router_copies{SEL})"),
        stat("Ready", "Routers whose /health says so.", "none", "sum(baton_router_ready{SEL})"),
        stat("Shared state", "1: every router reaches it.", "none",
             "min(baton_router_shared_state_up{SEL})"),
        stat("Resting workers", "That a router leaves alone after failures.", "none",
             "count(count by (namespace, job, worker) (baton_router_breaker_open{SEL})) "
             "or vector(0)",
             warn_above=1),
        stat("Prefix index", "Distinct KV blocks that a router knows of.", "short",
             "max(baton_router_prefix_entries{SEL})"),
        stat("Shedding", "Routers that have sent requests away lately.", "none",
             "sum(baton_admission_shedding{SEL})", warn_above=1),
        lines("Event loop", "How late it comes to its timers, at worst over ten seconds.", "s",
              Query("max by (instance) (baton_router_loop_lag_seconds{SEL})", "{{instance}}"),
              warn_above=0.25),
        lines("Cores in use", "By each router.", "none",
              _rate("process_cpu_seconds_total", "instance")),
        Panel(
            "Revisions",
            "Routers and workers work together only where fingerprints are equal.",
            "none",
            (Query("max by (instance, version, fingerprint) (baton_build_info{SEL})"),),
            view=View.TABLE,
        ),
    ),
)  # fmt: skip

_ADMISSION = Row(
    "Admission",
    (
        lines("Decisions", "Requests a second: admitted (at_once, waited) or why not.", "reqps",
              _rate("baton_admissions_total", "result", ',slo_class=~"$slo_class"'),
              is_stacked=True),
        lines("Queue", "Requests that wait in the routers.", "none",
              Query(_QUEUED, "{{slo_class}}"),
              Query("sum(baton_requests_waiting{SEL})", "not placed yet"), is_stacked=True),
        lines("Oldest", "Age of the oldest request that waits.", "s",
              Query("max by (slo_class) (baton_admission_queue_oldest_seconds"
                    '{SEL,slo_class=~"$slo_class"})', "{{slo_class}}"), warn_above=60),
        lines(
            "Wait of the admitted",
            "95th percentile of those that waited; zero while nobody does.",
            "s",
            Query(
                "histogram_quantile(0.95, sum by (slo_class, le) (rate("
                f"baton_admission_wait_seconds_bucket{{{_CLASS}}}[$__rate_interval]))) >= 0 "
                f"or {_QUEUED} * 0",
                "{{slo_class}}",
            ),
            width=6,
        ),
        lines("Work that waits", "In prompt tokens.", "none",
              Query("sum by (instance) (baton_admission_queue_tokens{SEL})", "{{instance}}"),
              width=6),
        lines(
            "Time to a refusal",
            "95th percentile: since arrival; since the moment from which a waiting request could "
            "not come in time. Zero while nobody is refused.",
            "s",
            Query(
                "histogram_quantile(0.95, sum by (since, le) (rate("
                "baton_admission_refusal_seconds_bucket{SEL}[$__rate_interval]))) >= 0 "
                "or sum by (since) (baton_admission_refusal_seconds_count{SEL}) * 0",
                "{{since}}",
            ),
            width=6,
        ),
        lines("Margin", "Added to predictions, so that nearly all are on the safe side.", "s",
              Query("max by (objective) (baton_admission_margin_seconds{SEL})", "{{objective}}"),
              width=6),
    ),
)  # fmt: skip

_PLACEMENT = Row(
    "Placement",
    (
        lines("Placements", "Requests a second by where their prompt is computed.", "reqps",
              _rate("baton_placements_total", "kind"), is_stacked=True),
        lines("Retries refused", "Failed requests a second that the retry budget did not cover.",
              "reqps", _rate("baton_router_retries_refused_total", "instance")),
        lines("Faults of workers", "Sessions ended, and faults in KV events, a second.", "ops",
              _rate("baton_router_session_faults_total", "instance"),
              _rate("baton_router_kv_event_faults_total", "reason")),
    ),
)  # fmt: skip

_PREDICTIONS = Row(
    "Predictions",
    (
        lines("Error of the performance model",
              "Mean share by which measurements differ from predictions.", "percentunit",
              Query("max by (quantity, role) (baton_perf_model_error_ratio{SEL})",
                    "{{quantity}} {{role}}"), warn_above=0.5),
        lines(
            "What came, by what was predicted",
            "Mean ratio over half an hour: above 1 admission was too bold. Requests without a "
            "prediction do not count.",
            "none",
            Query("baton:prediction:ratio_rate30m{SEL}", "{{objective}}"),
        ),
        Panel(
            "Ratios of times to first token",
            "How many requests took how many times what was predicted.",
            "none",
            (
                Query(
                    "sum by (le) (increase(baton_prediction_ratio_bucket"
                    '{SEL,objective="ttft"}[$__rate_interval]))',
                    "{{le}}",
                ),
            ),
            view=View.HEATMAP,
        ),
    ),
)  # fmt: skip

_PLANNER = Row(
    "Planner",
    (
        stat("At its budget", "1: more is needed than the devices allow.", "none",
             "max(baton_planner_at_budget{SEL})", warn_above=1),
        stat("Last decision", "Seconds since.", "s",
             "time() - max(baton_planner_last_decision_timestamp_seconds{SEL})", warn_above=180),
        stat("Routers it hears", "That gave their statistics.", "none",
             "max(baton_planner_routers{SEL})"),
        stat("Devices wanted", "By both pools.", "none",
             'max(baton_planner_devices{SEL,kind="desired"})'),
        stat("Devices allowed", "The budget.", "none",
             'max(baton_planner_devices{SEL,kind="budget"})'),
        stat("Failures", "Within an hour: statistics, decisions, orders.", "none",
             "sum(increase(baton_planner_failures_total{SEL}[1h]))", warn_above=1),
        lines("Workers", "Wanted, and there by state.", "none",
              Query("max by (pool) (baton_planner_desired_workers{SEL})", "{{pool}} wanted"),
              Query("max by (pool, state) (baton_planner_workers{SEL}) > 0",
                    "{{pool}} {{state}}")),
        lines("Arrivals", "Requests a second: now, and when a new worker would be ready.", "reqps",
              Query("max by (when) (baton_planner_arrivals_per_second{SEL})", "{{when}}")),
        lines("Targets kept", "Share of the last requests.", "percentunit",
              Query("max by (target) (baton_planner_attainment_ratio{SEL})", "{{target}}"), max=1),
        lines("Changes of pools", "A minute: decisions for one, workers over to another.",
              "none",
              Query("60 * sum by (pool, direction) (rate(baton_planner_decisions_total"
                    '{SEL,direction!="hold"}[$__rate_interval]))', "{{pool}} {{direction}}"),
              Query("60 * sum by (pool) (rate(baton_planner_role_changes_total{SEL}"
                    "[$__rate_interval]))", "over to {{pool}}")),
        lines("Error of the planner's models",
              "Mean share by which measured seconds differ from predicted ones.", "percentunit",
              Query("max by (term) (baton_planner_prediction_error_ratio{SEL})", "{{term}}"),
              warn_above=0.3),
        lines("Corrections", "Of the models by measurements; margin for targets that were missed.",
              "none",
              Query("max by (term) (baton_planner_correction_ratio{SEL})", "{{term}}"),
              Query("max by (pool) (baton_planner_margin_ratio{SEL})", "margin {{pool}}")),
    ),
)  # fmt: skip

_DOORS = Row(
    "Doors and shared state",
    (
        lines("Refused", "Requests a second by HTTP status.", "reqps",
              _rate("baton_requests_rejected_total", "status"), is_stacked=True),
        lines("Without a valid key or certificate",
              "Requests a second without a valid API key; TLS handshakes that failed.", "reqps",
              _rate("baton_requests_unauthorized_total", "reason"),
              _rate("baton_router_handshakes_refused_total", "reason"), is_stacked=True),
        lines("Clients that do not read", "Requests a second given up for it.", "reqps",
              _rate("baton_router_slow_clients_total", "instance")),
        lines("Quotas", "Answers a second; estimated ones without the shared state.", "reqps",
              _rate("baton_router_quota_answers_total", "answer, source"), is_stacked=True),
        lines("Notes between routers", "Placements told, a second.", "ops",
              _rate("baton_router_placement_notes_total", "direction")),
        lines("Refused values, lost spans", "A second: in the shared store; of traces.", "ops",
              _rate("baton_router_shared_garbage_total", "kind"),
              _rate("baton_trace_spans_total", "result", ',result!="exported"')),
    ),
)  # fmt: skip

BOARD = Board(
    uid="baton-router",
    title="Baton / Router & planner",
    description="Routers, admission, placement, predictions, planner, doors.",
    variables=(Variable("slo_class", "baton_admissions_total{SEL}", "slo_class"),),
    rows=(_COPIES, _ADMISSION, _PLACEMENT, _PREDICTIONS, _PLANNER, _DOORS),
)
