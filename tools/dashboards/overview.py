"""Overview: are promises kept, how fast is it, who sends what."""

from __future__ import annotations

from tools.dashboards.model import (
    Board,
    Panel,
    Query,
    Row,
    Variable,
    View,
    lines,
    mean,
    quantiles,
    stat,
)

_MODEL = 'SEL,model=~"$model"'
_CLASS = 'SEL,slo_class=~"$slo_class"'
_TENANT = 'SEL,tenant=~"$tenant"'

_NOW = Row(
    "Now",
    (
        stat(
            "Targets kept",
            "Share of admitted requests with targets that kept all of them, over 5 minutes.",
            "percentunit",
            '1 - max(baton:slo_missed:ratio_rate5m{SEL,objective="all"})',
        ),
        stat("Requests", "In the routers, waiting ones included.", "none",
             "sum(baton_requests_running{SEL})"),
        stat(
            "Tokens a second",
            "Sent to clients.",
            "none",
            "sum(rate(baton_generation_tokens_total{" + _MODEL + "}[$__rate_interval]))",
        ),
        stat(
            "Failed",
            "Share of finished requests that ended in an error, over 5 minutes.",
            "percentunit",
            "max(baton:requests_failed:ratio_rate5m{" + _MODEL + "})",
            warn_above=0.02,
        ),
        stat(
            "Workers",
            "Live ones, as the router sees them that sees fewest.",
            "none",
            "sum(min by (namespace, job, role) (baton_workers{SEL}))",
        ),
        stat(
            "Alerts",
            "Of this deployment that fire.",
            "none",
            'count(ALERTS{alertname=~"Baton.*",alertstate="firing",SEL}) or vector(0)',
            warn_above=1,
        ),
    ),
)  # fmt: skip

_OBJECTIVES = Row(
    "Objectives",
    (
        lines(
            "Targets kept by class",
            "Share of admitted requests with targets that kept all of them.",
            "percentunit",
            Query(
                "baton:slo_attainment:ratio_rate5m{" + _CLASS + ',objective="all"}',
                "{{slo_class}}",
            ),
            max=1,
        ),
        lines(
            "Burn rate of the error budget",
            "1 uses up the budget in just the time that it is for. Somebody is called at 14.4 over "
            "5 minutes and an hour.",
            "none",
            *(
                Query(
                    "max by (slo_class) (baton:slo_burn:rate" + window + "{" + _CLASS
                    + ',objective="all"})',
                    "{{slo_class}} " + window,
                )
                for window in ("5m", "30m", "1h", "6h")
            ),
            warn_above=14.4,
        ),
        lines(
            "Targets missed",
            "Requests a second, by the target that they missed.",
            "reqps",
            Query(
                "sum by (slo_class, objective) (rate(baton_slo_requests_total{" + _CLASS
                + ',objective!="all",result="missed"}[$__rate_interval]))',
                "{{slo_class}} {{objective}}",
            ),
        ),
        lines(
            "Goodput",
            "Requests a second that ended well and missed none of their targets.",
            "reqps",
            Query(
                "sum by (slo_class) (rate(baton_goodput_requests_total{" + _CLASS
                + "}[$__rate_interval]))",
                "{{slo_class}}",
            ),
            is_stacked=True,
        ),
        lines(
            "Tokens, and those of goodput",
            "Tokens a second to clients, and those of requests that missed no target.",
            "none",
            Query("sum(rate(baton_generation_tokens_total{" + _MODEL + "}[$__rate_interval]))",
                  "all"),
            Query("sum(rate(baton_goodput_tokens_total{" + _CLASS + "}[$__rate_interval]))",
                  "goodput"),
        ),
        lines(
            "Requests by end",
            "Finished requests a second.",
            "reqps",
            Query(
                "sum by (finish_reason) (rate(baton_requests_total{" + _MODEL
                + "}[$__rate_interval]))",
                "{{finish_reason}}",
            ),
            is_stacked=True,
        ),
    ),
)  # fmt: skip

_LATENCY = Row(
    "Latency",
    (
        lines(
            "Time to first token",
            "From arrival, at the router.",
            "s",
            *quantiles("baton_time_to_first_token_seconds"),
            width=12,
        ),
        lines(
            "Inter-token latency",
            "Between two tokens of a request, at the router.",
            "s",
            *quantiles("baton_inter_token_latency_seconds"),
            width=12,
        ),
        lines(
            "Mean inter-token latency of a request",
            "What the ITL target of a class is about.",
            "s",
            *quantiles("baton_request_mean_itl_seconds"),
            width=12,
        ),
        lines(
            "Whole request",
            "From arrival to the last token.",
            "s",
            *quantiles("baton_e2e_request_latency_seconds"),
            width=12,
        ),
        Panel(
            "Times to first token",
            "How many requests took how long.",
            "s",
            (
                Query(
                    "sum by (le) (increase(baton_time_to_first_token_seconds_bucket{" + _MODEL
                    + "}[$__rate_interval]))",
                    "{{le}}",
                ),
            ),
            view=View.HEATMAP,
        ),
        lines(
            "Where the time goes",
            "Mean times of a request: queue, prefill, KV transfer after it, decode.",
            "s",
            *(
                Query(mean(series, by="job"), name)
                for series, name in (
                    ("baton_request_queue_seconds", "queue"),
                    ("baton_request_prefill_seconds", "prefill"),
                    ("baton_kv_transfer_exposed_seconds", "exposed transfer"),
                    ("baton_request_decode_seconds", "decode"),
                )
            ),
            is_stacked=True,
        ),
        lines(
            "Length of requests",
            "Tokens of prompts and of outputs: median and 95th percentile.",
            "none",
            *(
                Query(
                    f"histogram_quantile({q}, sum by (le) (rate("
                    f"baton_request_{kind}_tokens_bucket{{{_MODEL}}}[$__rate_interval])))",
                    f"{kind} p{round(q * 100)}",
                )
                for kind in ("prompt", "generation")
                for q in (0.5, 0.95)
            ),
        ),
    ),
)  # fmt: skip


def _of_tenants(series: str, legend: str = "{{tenant}}", by: str = "tenant") -> Query:
    return Query(f"sum by ({by}) (rate({series}{{{_TENANT}}}[$__rate_interval]))", legend)


_TENANTS = Row(
    "Tenants",
    (
        lines(
            "Engine time by tenant",
            "Seconds of engines a second, as the workers measure them: GPUs in use, where these "
            "are GPUs.",
            "none",
            _of_tenants("baton_tenant_engine_seconds_total", "{{tenant}} {{role}}", "tenant, role"),
            is_stacked=True,
        ),
        lines(
            "Tokens by tenant",
            "Prompt and output tokens a second.",
            "none",
            _of_tenants("baton_tenant_prompt_tokens_total", "{{tenant}} prompt"),
            _of_tenants("baton_tenant_generation_tokens_total", "{{tenant}} output"),
            is_stacked=True,
        ),
        lines(
            "Work by tenant",
            "What quotas and turns are reckoned in: prompt tokens a second, and output as so many; "
            "prompt tokens whose KV was in a cache.",
            "none",
            _of_tenants("baton_tenant_work_tokens_total", "{{tenant}} work"),
            _of_tenants("baton_tenant_prompt_cached_tokens_total", "{{tenant}} cached"),
        ),
        lines(
            "Requests by tenant",
            "Requests a second that had work done for them.",
            "reqps",
            _of_tenants("baton_tenant_requests_total"),
            is_stacked=True,
        ),
        lines(
            "Waiting by tenant",
            "Requests in the routers' queues, of the tenants with most of them.",
            "none",
            Query(
                "sum by (tenant) (baton_admission_tenant_queue_requests{" + _TENANT
                + "}) or sum(baton_admission_queue_requests{SEL})",
                "{{tenant}}",
            ),
            is_stacked=True,
        ),
        lines(
            "Refused requests",
            "Requests a second that were refused before any work, by HTTP status.",
            "reqps",
            Query(
                "sum by (status) (rate(baton_requests_rejected_total{SEL}[$__rate_interval])) > 0"
                " or sum by (status) (rate(baton_requests_rejected_total"
                '{SEL,status="429"}[$__rate_interval]))',
                "{{status}}",
            ),
            is_stacked=True,
        ),
    ),
)  # fmt: skip

BOARD = Board(
    uid="baton-overview",
    title="Baton / Overview",
    description="Promises to clients, latency, traffic, tenants.",
    variables=(
        Variable("model", "baton_requests_total{SEL}", "model"),
        Variable("slo_class", "baton_admissions_total{SEL}", "slo_class"),
        Variable("tenant", "baton_tenant_requests_total{SEL}", "tenant"),
    ),
    rows=(_NOW, _OBJECTIVES, _LATENCY, _TENANTS),
)
