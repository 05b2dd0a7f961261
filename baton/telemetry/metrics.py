"""Live Prometheus series for what `baton.core.metrics` declares.

One `Metrics` object a process, made at its start and passed in, with a registry of its own. Not
thread-safe: all calls come from one event loop.

Histograms keep their counts here and hand them out when scraped: an observation is one search
and two additions, since one is made for every token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from baton.core.metrics import ALL_SERIES, Kind, Series

Observer = Callable[[float], None]


class _Child:
    """One label set of a histogram."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class _Histogram:
    """A collector over its children. Bounds are inclusive above, as Prometheus has them."""

    def __init__(self, series: Series) -> None:
        self._series = series
        self._children: dict[tuple[str, ...], _Child] = {}
        if not series.labels:
            self.child(())

    def child(self, labels: tuple[str, ...]) -> _Child:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = _Child(self._series.buckets)
        return child

    def remove(self, labels: tuple[str, ...]) -> None:
        self._children.pop(labels, None)

    def describe(self) -> Iterable[Metric]:
        series = self._series
        return [HistogramMetricFamily(series.name, series.help, labels=series.labels)]

    def collect(self) -> Iterable[Metric]:
        series = self._series
        family = HistogramMetricFamily(series.name, series.help, labels=series.labels)
        bounds = [*map(repr, map(float, series.buckets)), "+Inf"]
        for labels, child in self._children.items():
            cumulative = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip(bounds, child.counts, strict=True):
                cumulative += count
                buckets.append((bound, cumulative))
            family.add_metric(labels, buckets, child.total)
        yield family


class Metrics:
    """Every declared series. Label values come in the declared order."""

    content_type = CONTENT_TYPE_LATEST
    """Of what `render` returns."""

    def __init__(self, series: Sequence[Series] = ALL_SERIES) -> None:
        self._registry = CollectorRegistry()
        self._histograms: dict[str, _Histogram] = {}
        self._families: dict[str, Counter | Gauge] = {}
        self._children: dict[tuple[str, tuple[str, ...]], Counter | Gauge] = {}
        for s in series:
            if s.kind is Kind.HISTOGRAM:
                self._histograms[s.name] = _Histogram(s)
                self._registry.register(self._histograms[s.name])
                continue
            kind = Counter if s.kind is Kind.COUNTER else Gauge
            self._families[s.name] = kind(s.name, s.help, s.labels, registry=self._registry)

    def add(self, series: Series, amount: float, *labels: str) -> None:
        """Increase a counter, or move a gauge by `amount`."""
        self._child(series, labels).inc(amount)

    def set(self, series: Series, value: float, *labels: str) -> None:
        """Set a gauge."""
        child = self._child(series, labels)
        assert isinstance(child, Gauge), f"{series.name} is no gauge"
        child.set(value)

    def observe(self, series: Series, value: float, *labels: str) -> None:
        """Add to a histogram."""
        self._histograms[series.name].child(labels).observe(value)

    def observer(self, series: Series, *labels: str) -> Observer:
        """`observe` with everything looked up beforehand, for hot paths."""
        return self._histograms[series.name].child(labels).observe

    def remove(self, series: Series, *labels: str) -> None:
        """Drop one label set; it no longer shows. Unknown ones are ignored."""
        if series.kind is Kind.HISTOGRAM:
            self._histograms[series.name].remove(labels)
        elif labels and self._children.pop((series.name, labels), None) is not None:
            self._families[series.name].remove(*labels)

    def render(self) -> bytes:
        """All series in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _child(self, series: Series, labels: tuple[str, ...]) -> Counter | Gauge:
        key = (series.name, labels)
        child = self._children.get(key)
        if child is None:
            family = self._families[series.name]
            child = self._children[key] = family.labels(*labels) if labels else family
        return child
