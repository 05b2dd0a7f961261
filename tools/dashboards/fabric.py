"""Transfer and fabric: how KV moves between workers, over which links, and what fails."""

from __future__ import annotations

from tools.dashboards.model import Board, Query, Row, Variable, lines, per_worker, quantiles, stat

_WORKER = 'SEL,worker=~"$worker"'


def _rate(series: str) -> str:
    return per_worker(f"rate({series}{{{_WORKER}}}[$__rate_interval])")


_KIND = ("transport", "lane")


def _of_pairs(series: str, labels: tuple[str, ...] = (), *, transport: str = "") -> str:
    """A gauge of a reader and its peer."""
    chosen = f'{_WORKER},transport="{transport}"' if transport else _WORKER
    return per_worker(f"{series}{{{chosen}}}", "peer", *labels)


def _total(series: str) -> str:
    """Over the time shown, of all workers."""
    return f"sum({per_worker(f'increase({series}{{{_WORKER}}}[$__range])')})"


_TRANSFERS = Row(
    "Transfers",
    (
        lines("Hand-off", "Time with KV reads of a request in flight.", "s",
              *quantiles("baton_kv_transfer_seconds", matchers=',model=~"$model"')),
        lines("Exposed part", "Part of the hand-off after the prefill had ended: what users feel.",
              "s", *quantiles("baton_kv_transfer_exposed_seconds", matchers=',model=~"$model"')),
        lines("Hidden share", "Share of transfer time that the prefill covered.", "percentunit",
              Query('baton:kv_transfer_hidden:ratio_rate5m{SEL,model=~"$model"}', "{{model}}"),
              max=1),
        lines("Read", "Bytes a second that each worker reads from others.", "Bps",
              Query(_rate("baton_kv_read_bytes_total"), "{{worker}}"), is_stacked=True, width=12),
        lines("Bandwidth while reading", "Bytes a second while reads of a request are in flight.",
              "Bps",
              Query('baton:kv_transfer_bandwidth:bytes_rate5m{SEL,model=~"$model"}', "{{model}}"),
              width=12),
        lines(
            "Hidden share of requests",
            "How much of its transfer the prefill covered: of 95 %, 50 % and 5 % of the requests "
            "at least so much.",
            "percentunit",
            *(
                Query(
                    f"histogram_quantile({q}, sum by (le) (rate("
                    'baton_kv_transfer_hidden_ratio_bucket{SEL,model=~"$model"}[$__rate_interval])))',
                    f"p{round(q * 100)}",
                )
                for q in (0.05, 0.5, 0.95)
            ),
            max=1,
            width=12,
        ),
        lines(
            "Size of a hand-off",
            "KV bytes read for a request.",
            "bytes",
            *quantiles("baton_kv_transfer_bytes", matchers=',model=~"$model"'),
            width=12,
        ),
    ),
)  # fmt: skip

_LINKS = Row(
    "Links",
    (
        lines(
            "Links by transport",
            "Pairs of workers, by the transport they took; none: there is no link.",
            "none",
            Query(
                f"count by (transport, lane) ({_of_pairs('baton_kv_link_info', _KIND)})",
                "{{transport}} {{lane}}",
            ),
            is_stacked=True,
        ),
        lines("Rate of links", "Bytes a second of the last timed reads.", "Bps",
              Query(_of_pairs("baton_kv_link_bytes_per_second"), "{{peer}} to {{worker}}")),
        lines("Latency of links", "Median read of one block.", "s",
              Query(_of_pairs("baton_kv_link_latency_seconds"), "{{peer}} to {{worker}}")),
    ),
)  # fmt: skip

_FAULTS = Row(
    "Faults, over the time shown",
    (
        stat(
            "Pairs without link",
            "Now. They get no requests together; GPUs of different hosts never have one.",
            "none",
            f"count({_of_pairs('baton_kv_link_info', transport='none')}) or vector(0)",
            warn_above=1,
        ),
        stat("Failed reads", "That failed or were given up.", "none",
             _total("baton_kv_failed_reads_total"), warn_above=1),
        stat("Expired leases", "Whose reader went silent.", "none",
             _total("baton_kv_expired_leases_total"), warn_above=1),
        stat("Refused peers", "Connections to other workers that were refused.", "none",
             _total("baton_kv_refused_peers_total"), warn_above=1),
        stat("Transport restarts", "To end lost reads.", "none",
             _total("baton_kv_recycles_total"), warn_above=1),
        stat("Corrupt blocks", "Tier entries with a wrong checksum.", "none",
             _total("baton_kv_corrupt_blocks_total"), warn_above=1),
        lines("Reads and failures", "A second, of all workers.", "ops",
              Query("sum(" + _rate("baton_kv_reads_total") + ")", "reads"),
              Query("sum(" + _rate("baton_kv_failed_reads_total") + ")", "failed"), width=12),
        lines("Leases held", "On blocks that others read.", "none",
              Query(per_worker(f"baton_worker_kv_leases{{{_WORKER}}}"), "{{worker}}"), width=12),
    ),
)  # fmt: skip

_MOVES = Row(
    "Running requests on the move",
    (
        lines("Moves", "Running requests moved to another worker, a second.", "ops",
              Query("sum by (reason, result) (rate(baton_migrations_total{SEL}[$__rate_interval]))",
                    "{{reason}} {{result}}")),
        lines("Pause in the stream", "Of a request that moved, at the router.", "s",
              *quantiles("baton_migration_pause_seconds", by="job")),
        lines(
            "Takeovers",
            "Running requests a second that a worker took over, and those it could not.",
            "ops",
            Query("sum(" + _rate("baton_kv_takeovers_total") + ")", "taken over"),
            Query("sum(" + _rate("baton_kv_failed_takeovers_total") + ")", "failed"),
        ),
        lines(
            "Pause of a takeover",
            "Mean, from asking the old worker to stop until the KV is here and valid.",
            "s",
            Query(
                _total("baton_kv_takeover_pause_seconds_total")
                + " / (" + _total("baton_kv_takeovers_total") + " > 0)",
                "mean over the time shown",
            ),
        ),
    ),
)  # fmt: skip

BOARD = Board(
    uid="baton-fabric",
    title="Baton / Transfer & fabric",
    description="KV between workers: times, links, faults, moves.",
    variables=(
        Variable("model", "baton_requests_total{SEL}", "model"),
        Variable("worker", "baton_worker_requests_running{SEL}", "worker"),
    ),
    rows=(_TRANSFERS, _LINKS, _FAULTS, _MOVES),
)
