"""Pools and KV: what workers do, what they hold, what they find again.

Every router reports every worker, hence `per_worker`.
"""

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
    per_worker,
    stat,
)

_WORKER = 'SEL,worker=~"$worker"'


def _gauge(series: str) -> Query:
    return Query(per_worker(f"{series}{{{_WORKER}}}"), "{{worker}}")


def _rate(series: str) -> str:
    return per_worker(f"rate({series}{{{_WORKER}}}[$__rate_interval])")


def _of_tiers(series: str, legend: str) -> Query:
    return Query(f"sum by (tier) ({per_worker(f'{series}{{{_WORKER}}}', 'tier')})", legend)


_WORK = Row(
    "Work",
    (
        stat("Prefill workers", "Live ones.", "none",
             'min(baton_workers{SEL,role="prefill"})'),
        stat("Decode workers", "Live ones.", "none",
             'min(baton_workers{SEL,role="decode"})'),
        stat(
            "Prefill pool busy",
            "Share of the time that engines spend in steps, over 5 minutes.",
            "percentunit",
            'avg(baton:pool_busy:ratio_rate5m{SEL,role="prefill"})',
        ),
        stat(
            "Decode pool busy",
            "Share of the time that engines spend in steps, over 5 minutes.",
            "percentunit",
            'avg(baton:pool_busy:ratio_rate5m{SEL,role="decode"})',
        ),
        stat("Fullest worker", "Share of its KV blocks that live sequences hold.", "percentunit",
             "max(baton:worker_kv_usage:ratio{SEL})", warn_above=0.9),
        stat("Without KV events", "Workers placed by load alone.", "none",
             "count(count by (namespace, job, worker) (baton_router_kv_unmatched{SEL})) "
             "or vector(0)",
             warn_above=1),
        lines("Running", "Sequences in the batch.", "none",
              _gauge("baton_worker_requests_running"), is_stacked=True),
        lines("Waiting", "Sequences that the worker has not admitted yet.", "none",
              _gauge("baton_worker_requests_waiting"), is_stacked=True),
        lines("Busy", "Share of the time that the engine spends in steps.", "percentunit",
              Query(_rate("baton_worker_busy_seconds_total"), "{{worker}}"), max=1),
        lines(
            "Step",
            "Mean duration of an engine step; an idle engine makes none.",
            "s",
            Query(
                _rate("baton_worker_busy_seconds_total")
                + " / (" + _rate("baton_worker_steps_total") + " > 0)",
                "{{worker}}",
            ),
        ),
        lines(
            "Engine time of a request",
            "Mean share of engine steps, times the ranks of the worker, by pool.",
            "s",
            Query(
                mean("baton_request_engine_seconds", by="role"), "{{role}}",
            ),
        ),
        lines("Changes of role", "Workers that went over to a pool, within 15 minutes.", "none",
              Query("max by (namespace, job, role) "
                    "(increase(baton_router_role_changes_total{SEL}[15m]))", "to {{role}}")),
        lines("Preemptions", "Sequences a second that were stopped for want of KV blocks.", "ops",
              Query(_rate("baton_worker_preemptions_total"), "{{worker}}")),
    ),
)  # fmt: skip

_KV = Row(
    "KV memory",
    (
        lines("KV usage", "Share of the blocks that live sequences hold.", "percentunit",
              _gauge("baton_worker_kv_usage_ratio"), max=1, warn_above=0.9),
        lines(
            "Blocks by state",
            "Free, cached (given up when needed) and held ones, of all workers.",
            "none",
            Query(
                f"sum by (state) ({per_worker(f'baton_worker_kv_blocks{{{_WORKER}}}', 'state')})",
                "{{state}}",
            ),
            is_stacked=True,
        ),
        lines("Leases", "On blocks that another worker reads.", "none",
              _gauge("baton_worker_kv_leases")),
        lines("Quarantine", "Blocks that a given-up read may still write to.", "none",
              _gauge("baton_worker_kv_quarantined_blocks")),
        Panel(
            "Workers",
            "What is fixed for the life of each worker; fingerprints of one model must be equal.",
            "none",
            (
                Query(
                    per_worker(
                        f"baton_worker_info{{{_WORKER}}}", "model", "block_size", "num_blocks",
                        "kv_dtype", "max_model_len", "fingerprint",
                    )
                ),
            ),
            view=View.TABLE,
            width=16,
        ),
    ),
)  # fmt: skip

_PREFIXES = Row(
    "Prefixes found again",
    (
        lines("Hit ratio", "Share of the prompt tokens that a worker found in its cache.",
              "percentunit", Query("baton:prefix_cache_hit:ratio_rate5m{SEL}", "{{role}}"), max=1),
        lines(
            "Prompt tokens",
            "Tokens a second of finished requests, and those whose KV was in a cache.",
            "none",
            Query('sum(rate(baton_prompt_tokens_total{SEL,model=~"$model"}[$__rate_interval]))',
                  "all"),
            Query(
                'sum(rate(baton_prompt_cached_tokens_total{SEL,model=~"$model"}[$__rate_interval]))',
                "cached",
            ),
        ),
        lines(
            "Offers and what came of them",
            "Prompts a second sent with the name of a worker that caches more; blocks read "
            "from such workers a second.",
            "none",
            Query("sum(rate(baton_prefix_offers_total{SEL}[$__rate_interval]))", "offers"),
            Query("sum(" + _rate("baton_kv_fetched_blocks_total") + ")", "blocks"),
        ),
    ),
)  # fmt: skip

_TIERS = Row(
    "Tiers",
    (
        lines(
            "Tier usage",
            "Bytes in use and the size of each tier, of all workers; nothing where tiers are off.",
            "bytes",
            _of_tiers("baton_kv_tier_bytes", "{{tier}}"),
            _of_tiers("baton_kv_tier_max_bytes", "{{tier}} size"),
        ),
        lines("Blocks kept", "Outside the pools, by tier.", "none",
              _of_tiers("baton_kv_tier_blocks", "{{tier}}")),
        lines(
            "To and from tiers",
            "Blocks a second.",
            "none",
            Query("sum(" + _rate("baton_kv_saved_blocks_total") + ")", "saved"),
            Query("sum(" + _rate("baton_kv_restored_blocks_total") + ")", "restored"),
            Query("sum(" + _rate("baton_kv_corrupt_blocks_total") + ")", "corrupt"),
        ),
    ),
)  # fmt: skip

BOARD = Board(
    uid="baton-pools",
    title="Baton / Pools & KV",
    description="Workers, their KV memory, prefix caches, tiers.",
    variables=(
        Variable("model", "baton_requests_total{SEL}", "model"),
        Variable("worker", "baton_worker_requests_running{SEL}", "worker"),
    ),
    rows=(_WORK, _KV, _PREFIXES, _TIERS),
)
