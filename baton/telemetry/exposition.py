"""The text format of Prometheus, version 0.0.4, written fast: a scrape holds up the event loop that
streams tokens, so heads and label sets are put together once and kept.

Does not know: what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton.core.metrics import Kind

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LabelSet = tuple[str, ...]
_LABEL_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


class Counts:
    """One label set of a histogram. Bounds are inclusive above, as Prometheus has them."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0


class FamilyText:
    """One family under one name."""

    def __init__(self, name: str, help: str, kind: Kind, bounds: Sequence[float] = ()) -> None:
        self.name = name
        self.head = f"# HELP {name} {help.translate(_HELP_ESCAPES)}\n# TYPE {name} {kind.value}\n"
        self._bounds = [*map(repr, map(float, bounds)), "+Inf"]
        self._plain: dict[LabelSet, str] = {}
        """Up to the value, by label set."""
        self._buckets: dict[LabelSet, list[str]] = {}
        """All lines of one label set of a histogram, up to their values."""

    def value(self, key: LabelSet, labels: Mapping[str, str] | None, value: float) -> str:
        """A line. `labels` may be None once the key has been seen: see `knows`."""
        start = self._plain.get(key)
        if start is None:
            assert labels is not None
            start = self._plain[key] = f"{self.name}{_braces(labels)} "
        return f"{start}{float(value)!r}\n"

    def histogram(self, key: LabelSet, labels: Mapping[str, str] | None, counts: Counts) -> str:
        """The lines of one label set."""
        starts = self._buckets.get(key)
        if starts is None:
            assert labels is not None
            starts = self._buckets[key] = self._histogram_starts(labels)
        cumulative, lines = 0, []
        for start, count in zip(starts, counts.counts, strict=False):
            cumulative += count
            lines.append(f"{start}{cumulative}.0\n")
        lines.append(f"{starts[-2]}{cumulative}.0\n{starts[-1]}{counts.total!r}\n")
        return "".join(lines)

    def knows(self, key: LabelSet) -> bool:
        return key in self._plain or key in self._buckets

    def forget(self, key: LabelSet) -> None:
        self._plain.pop(key, None)
        self._buckets.pop(key, None)

    def _histogram_starts(self, labels: Mapping[str, str]) -> list[str]:
        buckets = [f"{self.name}_bucket{_braces({**labels, 'le': le})} " for le in self._bounds]
        own = _braces(labels)
        return [*buckets, f"{self.name}_count{own} ", f"{self.name}_sum{own} "]


def _braces(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{labels[name].translate(_LABEL_ESCAPES)}"' for name in sorted(labels))
    return "{" + ",".join(pairs) + "}"
