"""What requests got live and in a simulation, beside each other.

Does not know: where either comes from.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.accuracy_workloads import Asked

GOAL = 0.15
WARM_SHARE = 0.1
"""Of a workload's requests, those that count in neither."""


@dataclass(frozen=True, slots=True)
class Got:
    """What one request got, live or simulated."""

    ttft_s: float
    itl_s: float | None
    sent_s: float
    last_s: float
    num_output_tokens: int


def compare(
    asked: Sequence[Asked], live: Sequence[Got], simulated: Sequence[Got]
) -> dict[str, Any]:
    """Figures of both, and simulated by live."""
    num_warm = int(WARM_SHARE * len(asked))
    seen, expected = figures(live[num_warm:]), figures(simulated[num_warm:])
    return {
        "live": seen,
        "simulated": expected,
        "ratios": {name: expected[name] / seen[name] for name in seen},
    }


def figures(got: Sequence[Got]) -> dict[str, float]:
    ttft = sorted(g.ttft_s for g in got)
    itl = sorted(g.itl_s for g in got if g.itl_s is not None)
    span_s = max(g.last_s for g in got) - min(g.sent_s for g in got)
    return {
        "ttft_p50_s": _percentile(ttft, 0.5),
        "ttft_p90_s": _percentile(ttft, 0.9),
        "itl_p50_s": _percentile(itl, 0.5),
        "itl_p90_s": _percentile(itl, 0.9),
        "tokens_per_s": sum(g.num_output_tokens for g in got) / span_s,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, of figures and of ratios."""
    summary = []
    for when in dict.fromkeys(row["profile"] for row in rows):
        for name in dict.fromkeys(row["workload"] for row in rows):
            own = [r for r in rows if r["workload"] == name and r["profile"] == when]
            summary.append(
                {
                    "workload": name,
                    "profile": when,
                    **{
                        part: {
                            figure: statistics.median(r[part][figure] for r in own)
                            for figure in own[0][part]
                        }
                        for part in ("live", "simulated", "ratios")
                    },
                }
            )
    return summary


def print_summary(summary: Sequence[dict[str, Any]]) -> None:
    for row in summary:
        print(f"\n{row['workload']}, profile measured {row['profile']}")
        for name, ratio in row["ratios"].items():
            live, simulated = row["live"][name], row["simulated"][name]
            mark = "" if abs(ratio - 1) <= GOAL else f"  beyond {GOAL:.0%}"
            print(f"  {name:14} live {live:9.4f}  simulated {simulated:9.4f}  x{ratio:.2f}{mark}")


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
