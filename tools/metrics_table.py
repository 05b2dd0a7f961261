"""Write the tables of docs/metrics.md from the declared series, or check that they are fresh
(--check).

Run by `python -m tools.metrics_table`, from the repository's root.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from baton.core.metrics import ALL_SERIES, Series
from baton.core.planner_metrics import PLANNER_SERIES
from baton.core.vllm_metrics import VLLM_NAMES, VllmName

PAGE = Path(__file__).resolve().parent.parent / "docs/metrics.md"
FROM_SETTINGS = {"model": ("",), "slo_class": ("",)}
"""Labels whose values each router knows from its settings."""
MAX_SHOWN_VALUES = 12


def page(text: str) -> str:
    """`text` with what stands between the marks made anew."""
    text = _between(text, "series", _series_table(ALL_SERIES))
    text = _between(text, "planner", _series_table(PLANNER_SERIES))
    return _between(text, "vllm", _vllm_table(VLLM_NAMES))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if not fresh")
    arguments = parser.parse_args(argv)
    old = PAGE.read_text()
    new = page(old)
    if arguments.check:
        return int(new != old)
    PAGE.write_text(new)
    return 0


def _between(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}{content}{end}{tail}"


def _series_table(all_series: Iterable[Series]) -> str:
    rows = ["| series | kind | labels | from the start | |", "|---|---|---|---|---|"]
    for s in all_series:
        is_there = "yes" if s.label_sets(FROM_SETTINGS) else ""
        rows.append(f"| `{s.name}` | {s.kind.value} | {_labels(s)} | {is_there} | {s.help} |")
    return "\n".join(rows) + "\n"


def _labels(series: Series) -> str:
    values = dict(series.values)
    shown = []
    for label in series.labels:
        known = values.get(label)
        few = known is not None and len(known) <= MAX_SHOWN_VALUES
        shown.append(f"{label} ({', '.join(known)})" if known and few else label)
    return "; ".join(shown) or "–"


def _vllm_table(names: Iterable[VllmName]) -> str:
    rows = ["| name | same values as | labels |", "|---|---|---|"]
    for n in names:
        labels = [theirs for theirs, _ in n.labels]
        labels += [f'{name}="{value}"' for name, value in n.fixed]
        rows.append(f"| `{n.name}` | `{n.of.name}` | {', '.join(labels)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
