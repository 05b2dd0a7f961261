"""A run as labelled texts, the same on the terminal and on the page."""

from __future__ import annotations

from baton.loadtest.figures import Distribution, Figures, Latencies
from baton.loadtest.options import Targets
from baton.loadtest.result import LoadResult

HEADINGS = ("", "mean", "p50", "p90", "p95", "p99", "max")


def summary_rows(result: LoadResult) -> list[tuple[str, str]]:
    figures = result.figures
    rows = [
        ("requests", _requests(figures)),
        (
            "rates",
            f"{figures.rates.requests_per_s:.2f} requests/s, "
            f"{figures.rates.output_tokens_per_s:,.0f} output and "
            f"{figures.rates.prompt_tokens_per_s:,.0f} prompt tokens/s over {figures.span_s:.1f} s",
        ),
        ("tokens", _tokens(figures)),
        ("at a time", f"mean {figures.mean_in_flight:.1f}, at most {figures.max_in_flight}"),
    ]
    if result.targets.has_any:
        rows.append(("targets", _targets(figures, result.targets)))
        rows.append(("goodput", f"{figures.attainment.goodput_per_s:.2f} requests/s within them"))
    if figures.steady is not None:
        steady = figures.steady
        rows.append(
            (
                "steady",
                f"{steady.start_s:.1f} to {steady.end_s:.1f} s: "
                f"{steady.rates.requests_per_s:.2f} requests/s, "
                f"{steady.rates.output_tokens_per_s:,.0f} output tokens/s"
                + _steady_latency(steady.latencies),
            )
        )
    generator = result.generator
    lag = "" if generator.lag_p99_s is None else f", requests late {_ms(generator.lag_p99_s)}"
    rows.append(
        (
            "generator",
            f"{generator.cpu_share:.0%} of a core; p99: loop late "
            f"{_ms(generator.loop_late_p99_s)}{lag}",
        )
    )
    return rows


def latency_rows(latencies: Latencies) -> list[tuple[str, ...]]:
    """Milliseconds, in the order of HEADINGS."""
    named = (
        ("TTFT", latencies.ttft_s),
        ("ITL", latencies.itl_s),
        ("gaps", latencies.gap_s),
        ("E2E", latencies.e2e_s),
        ("connect", latencies.connect_s),
    )
    return [(name, *_cells(d)) for name, d in named if d is not None]


def _cells(d: Distribution) -> tuple[str, ...]:
    return tuple(f"{1000 * v:,.2f}" for v in (d.mean, d.p50, d.p90, d.p95, d.p99, d.max))


def _requests(figures: Figures) -> str:
    parts = [f"{figures.num_ok} answered"]
    if failed := figures.num_sent - figures.num_ok:
        parts.append(f"{failed} failed ({failed / figures.num_sent:.1%})")
    if figures.num_given_up:
        parts.append(f"{figures.num_given_up} given up when stopped")
    if figures.num_wrong_length:
        parts.append(f"{figures.num_wrong_length} of another length than asked for")
    return ", ".join(parts)


def _tokens(figures: Figures) -> str:
    answered = max(1, figures.num_ok)
    share = figures.cached_share
    cached = "" if share is None else f", {share:.1%} of prompt tokens cached"
    return (
        f"mean {figures.num_prompt_tokens / answered:,.0f} in, "
        f"{figures.num_output_tokens / answered:,.0f} out{cached}"
    )


def _targets(figures: Figures, targets: Targets) -> str:
    shares = figures.attainment
    parts = [
        f"{name} {limit:g} s {share:.1%}"
        for name, limit, share in (
            ("TTFT", targets.ttft_s, shares.ttft),
            ("ITL", targets.itl_s, shares.itl),
            ("E2E", targets.e2e_s, shares.e2e),
        )
        if limit is not None and share is not None
    ]
    return f"{shares.all:.1%} kept all: {', '.join(parts)}"


def _steady_latency(latencies: Latencies) -> str:
    if latencies.ttft_s is None or latencies.itl_s is None:
        return ""
    return f"; p50 TTFT {_ms(latencies.ttft_s.p50)}, ITL {_ms(latencies.itl_s.p50)}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
