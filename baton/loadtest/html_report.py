"""A run as one page that needs nothing else: no network, no script; light and dark.

Plots are inline SVG. Whatever a server or a file said is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from baton.loadtest.result import LoadResult
from baton.loadtest.rows import HEADINGS, latency_rows, summary_rows
from baton.loadtest.svg_plots import Axes, Series, cumulative, lines, points

MAX_GAPS = 100_000
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#59636e;--grid:#d8dee4;--warn:#9a3412;
--c0:#0969da;--c1:#bc4c00;--c2:#1a7f37;--c3:#8250df}
@media(prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#9198a1;--grid:#30363d;
--warn:#ffa657;--c0:#58a6ff;--c1:#f0883e;--c2:#56d364;--c3:#bc8cff}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;max-width:76rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}.dim{color:var(--dim)}
table{border-collapse:collapse;display:block;overflow-x:auto}
th,td{padding:.25rem .75rem;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}
table.n td,table.n th:not(:first-child){text-align:right;font-variant-numeric:tabular-nums}
.warn{border-left:4px solid var(--warn);padding:.25rem .75rem;margin:.5rem 0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto}
svg text{fill:var(--dim);font-size:11px}.grid{stroke:var(--grid);stroke-width:1}
.mark{stroke:var(--fg);stroke-dasharray:4 3}.line{fill:none;stroke-width:1.5}
.dots{fill:none;stroke-width:5;stroke-linecap:round;stroke-opacity:.7}
.key{margin-left:.75rem;font-weight:400}.key::before{content:"\\25CF ";color:currentColor}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}
.key.s0{color:var(--c0)}.key.s1{color:var(--c1)}.key.s2{color:var(--c2)}.key.s3{color:var(--c3)}
"""


def html_report(result: LoadResult) -> str:
    kept = "kept" if result.is_kept else "missed"
    stopped = " Stopped early." if result.is_stopped else ""
    share = f"{result.figures.attainment.all:.1%} of requests, {result.targets.share:.0%} wanted"
    sections = [
        f"<h1>Load on {escape(result.model)}</h1>",
        f'<p class="dim">{escape(result.place)}, {escape(result.started_at)}</p>',
        f"<p><strong>Targets {kept}</strong>: {share}.{stopped}</p>",
        *(f'<p class="warn">{escape(text)}</p>' for text in result.generator.warnings),
        _pairs(summary_rows(result)),
        "<h2>Latencies in milliseconds</h2>",
        _numbers(HEADINGS, latency_rows(result.figures.latencies)),
        _errors(result),
        "<h2>Over time</h2>",
        f'<div class="plots">{_over_time(result)}</div>',
        "<h2>Distributions</h2>",
        f'<div class="plots">{_distributions(result)}</div>',
        "<h2>Set-up</h2>",
        _pairs((name, str(value)) for name, value in result.setup.items()),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Load on {escape(result.model)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
        for name, text in rows
    )
    return f"<table>{body}</table>"


def _numbers(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<table class="n"><tr>{head}</tr>{body}</table>'


def _errors(result: LoadResult) -> str:
    errors = result.figures.errors
    if not errors:
        return ""
    rows = ((f"{error.count} × {error.label}", error.example) for error in errors)
    return f"<h2>Errors</h2>{_pairs(rows)}"


def _over_time(result: LoadResult) -> str:
    timeline, targets = result.timeline, result.targets
    times = [i * timeline.slice_s for i in range(len(timeline.sent_per_s))]
    ok = [o for o in result.outcomes if o.is_ok]
    seen = [(t, a) for t, a in zip(times, timeline.attainment, strict=True) if a is not None]
    plots = [
        lines(
            Axes("Requests per second", "seconds", "requests/s"),
            [
                Series("sent", times, timeline.sent_per_s),
                Series("answered", times, timeline.ended_per_s),
                Series("failed", times, timeline.failed_per_s),
            ],
        ),
        lines(
            Axes("Requests at a time", "seconds", "requests"),
            [Series("at a time", times, timeline.in_flight)],
        ),
        lines(
            Axes("Output tokens per second", "seconds", "tokens/s"),
            [Series("tokens/s", times, timeline.output_tokens_per_s)],
        ),
        lines(
            Axes("Requests within all targets", "seconds", "share", y_is_share=True),
            [Series("share", [t for t, _ in seen], [a for _, a in seen])],
        ),
    ]
    for name, values, target in (
        ("TTFT", [(o.sent_s, o.ttft_s) for o in ok], targets.ttft_s),
        ("ITL", [(o.sent_s, o.itl_s) for o in ok], targets.itl_s),
    ):
        known = [(at, 1000 * v) for at, v in values if v is not None]
        marks = [] if target is None else [("target", 1000 * target)]
        plots.append(
            points(
                Axes(f"{name} of each request", "sent, seconds", "ms", marks_y=marks),
                [Series(name, [at for at, _ in known], [v for _, v in known])],
            )
        )
    return "".join(plots)


def _distributions(result: LoadResult) -> str:
    ok = [o for o in result.outcomes if o.is_ok]
    targets = result.targets
    plots = []
    for name, values, target in (
        ("TTFT", [o.ttft_s for o in ok], targets.ttft_s),
        ("ITL (mean of each request)", [o.itl_s for o in ok], targets.itl_s),
        ("Single gaps between tokens", _gaps(result), None),
        ("E2E", [o.e2e_s for o in ok], targets.e2e_s),
    ):
        marks = [] if target is None else [("target", 1000 * target)]
        series = cumulative("share", [1000 * v for v in values if v is not None])
        axes = Axes(name, "ms", "share", x_is_log=True, y_is_share=True, marks_x=marks)
        plots.append(lines(axes, [series]))
    return "".join(plots)


def _gaps(result: LoadResult) -> list[float]:
    """Of all requests, thinned when there are very many."""
    every = [np.diff(np.asarray(o.token_times_s)) for o in result.outcomes if o.is_ok]
    gaps = np.concatenate(every) if every else np.zeros(0)
    return [float(v) for v in gaps[:: max(1, len(gaps) // MAX_GAPS)]]
