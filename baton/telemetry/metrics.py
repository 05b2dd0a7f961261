"""Live Prometheus series for what `baton.core.metrics` declares.

One `Metrics` object a process, made at its start and passed in. Not thread-safe: all calls come
from one event loop.

Values are kept here and written out when scraped: a count is one addition, an observation one
search and two, since one is made for every token. Second names (`baton.core.vllm_metrics`) are
written from the same values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest

from baton.core.metrics import ALL_SERIES, WORKER_INFO, Kind, Series
from baton.core.vllm_metrics import VllmName
from baton.telemetry.exposition import CONTENT_TYPE, Counts, FamilyText, LabelSet

_WORKER_KEY = ("role", "worker")


class Observer(Protocol):
    """Adds `count` equal observations."""

    def __call__(self, value: float, count: int = 1) -> None: ...


class _Histogram(Counts):
    __slots__ = ()

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count


class _SecondName:
    """A series under another name."""

    def __init__(self, declared: VllmName) -> None:
        self.declared = declared
        of = declared.of
        self.text = FamilyText(declared.name, f"{of.help} As {of.name}.", of.kind, of.buckets)

    def labels(self, own: LabelSet, models: Mapping[LabelSet, str]) -> dict[str, str]:
        declared = self.declared
        values = dict(zip(declared.of.labels, own, strict=True))
        if "model" not in values:
            values["model"] = models.get(own[:2], "")
        renamed = dict(declared.renamed)
        shown = {
            theirs: renamed.get(values[ours], values[ours]) for theirs, ours in declared.labels
        }
        return {**shown, **dict(declared.fixed)}


class Metrics:
    """Every declared series. Label values come in the declared order."""

    content_type = CONTENT_TYPE
    """Of what `render` returns."""

    def __init__(
        self,
        series: Sequence[Series] = ALL_SERIES,
        *,
        known: Mapping[str, Sequence[str]] | None = None,
        second_names: Sequence[VllmName] = (),
        shows_process: bool = False,
    ) -> None:
        """`known`: values of labels that the settings decide; families whose label values are all
        known are there from the start. `shows_process`: also process_* and python_*."""
        self._series = tuple(series)
        self._values: dict[str, dict[LabelSet, float]] = {}
        self._histograms: dict[str, dict[LabelSet, _Histogram]] = {}
        self._texts = {s.name: FamilyText(s.name, s.help, s.kind, s.buckets) for s in series}
        for s in series:
            sets = s.label_sets(known or {})
            if s.kind is Kind.HISTOGRAM:
                self._histograms[s.name] = {labels: _Histogram(s.buckets) for labels in sets}
            else:
                self._values[s.name] = dict.fromkeys(sets, 0.0)
        self._second_names: dict[str, list[_SecondName]] = {}
        self._seconds_of: dict[str, list[_SecondName]] = {}
        """By the series they have their values from."""
        for declared in second_names:
            second = _SecondName(declared)
            self._second_names.setdefault(declared.name, []).append(second)
            self._seconds_of.setdefault(declared.of.name, []).append(second)
        self._joined = [
            second
            for seconds in self._second_names.values()
            for second in seconds
            if second.declared.of.labels == _WORKER_KEY
        ]
        self._process = _process_registry() if shows_process else None

    def add(self, series: Series, amount: float, *labels: str) -> None:
        """Increase a counter, or move a gauge by `amount`."""
        children = self._values[series.name]
        if labels in children:
            children[labels] += amount
        else:
            self._set_first(series, labels, amount)

    def set(self, series: Series, value: float, *labels: str) -> None:
        """Set a gauge."""
        assert series.kind is Kind.GAUGE, f"{series.name} is no gauge"
        children = self._values[series.name]
        if labels in children:
            children[labels] = value
        else:
            self._set_first(series, labels, value)

    def observe(self, series: Series, value: float, *labels: str) -> None:
        """Add to a histogram."""
        self._histogram(series, labels).observe(value)

    def observer(self, series: Series, *labels: str) -> Observer:
        """`observe` with everything looked up beforehand, for hot paths."""
        return self._histogram(series, labels).observe

    def remove(self, series: Series, *labels: str) -> None:
        """Drop one label set; it no longer shows. Unknown ones are ignored."""
        if not labels:
            return
        if series.kind is Kind.HISTOGRAM:
            self._histograms[series.name].pop(labels, None)
        else:
            self._values[series.name].pop(labels, None)
        self._texts[series.name].forget(labels)
        for second in self._seconds_of.get(series.name, ()):
            second.text.forget(labels)
        if series.name == WORKER_INFO.name:
            # Its model was looked up for them.
            for joined in self._joined:
                joined.text.forget(labels[:2])

    def render(self) -> bytes:
        """All series in the text format of Prometheus."""
        lines = [*self._own_lines(), *self._second_lines()]
        own = "".join(lines).encode()
        return own if self._process is None else own + generate_latest(self._process)

    def _own_lines(self) -> Iterator[str]:
        for s in self._series:
            text = self._texts[s.name]
            yield text.head
            for labels in self._label_sets(s):
                shown = None if text.knows(labels) else dict(zip(s.labels, labels, strict=True))
                yield self._line(text, s, labels, shown)

    def _second_lines(self) -> Iterator[str]:
        models: dict[LabelSet, str] | None = None
        for seconds in self._second_names.values():
            yield seconds[0].text.head
            for second in seconds:
                of, text = second.declared.of, second.text
                for labels in self._label_sets(of):
                    shown = None
                    if not text.knows(labels):
                        models = self._models() if models is None else models
                        shown = second.labels(labels, models)
                    yield self._line(text, of, labels, shown)

    def _line(
        self, text: FamilyText, series: Series, labels: LabelSet, shown: Mapping[str, str] | None
    ) -> str:
        if series.kind is Kind.HISTOGRAM:
            return text.histogram(labels, shown, self._histograms[series.name][labels])
        return text.value(labels, shown, self._values[series.name][labels])

    def _models(self) -> dict[LabelSet, str]:
        """By role and worker."""
        index = WORKER_INFO.labels.index("model")
        return {labels[:2]: labels[index] for labels in self._values.get(WORKER_INFO.name, ())}

    def _label_sets(self, series: Series) -> Sequence[LabelSet]:
        if series.kind is Kind.HISTOGRAM:
            return [*self._histograms[series.name]]
        return [*self._values[series.name]]

    def _histogram(self, series: Series, labels: LabelSet) -> _Histogram:
        children = self._histograms[series.name]
        histogram = children.get(labels)
        if histogram is None:
            _check_labels(series, labels)
            histogram = children[labels] = _Histogram(series.buckets)
        return histogram

    def _set_first(self, series: Series, labels: LabelSet, value: float) -> None:
        _check_labels(series, labels)
        self._values[series.name][labels] = value


def _check_labels(series: Series, labels: LabelSet) -> None:
    assert len(labels) == len(series.labels), f"{series.name} has the labels {series.labels}"


def _process_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
