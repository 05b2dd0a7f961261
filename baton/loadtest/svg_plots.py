"""Plots as SVG text: lines over time, points over time, cumulative shares. Pure.

Colours are those of the page's style sheet (classes `s0`, `s1`, ...), so that one drawing is right
in light and dark. Every plot has a title and a description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 36
MAX_POINTS = 4000


@dataclass(frozen=True, slots=True)
class Series:
    label: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, slots=True)
class Axes:
    title: str
    x_label: str
    y_label: str
    x_is_log: bool = False
    y_is_share: bool = False
    """From 0 to 1, shown as %."""
    marks_y: Sequence[tuple[str, float]] = ()
    """Lines across, such as a target."""
    marks_x: Sequence[tuple[str, float]] = ()


def lines(axes: Axes, series: Sequence[Series]) -> str:
    return _plot(axes, series, as_points=False)


def points(axes: Axes, series: Sequence[Series]) -> str:
    return _plot(axes, [_thinned(s) for s in series], as_points=True)


def cumulative(label: str, values: Sequence[float]) -> Series:
    """Share of values up to each; at most some hundred steps."""
    ordered = sorted(values)
    if not ordered:
        return Series(label, (), ())
    every = max(1, len(ordered) // 400)
    picked = [*range(0, len(ordered), every), len(ordered) - 1]
    return Series(label, [ordered[i] for i in picked], [(i + 1) / len(ordered) for i in picked])


class _Scale:
    """Values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, *, is_log: bool) -> None:
        self.low, self.high, self.is_log = low, high, is_log
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        if self.is_log:
            span = math.log10(self.high / self.low)
            share = math.log10(max(value, self.low) / self.low) / span
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            powers = [10.0**n for n in range(first, last + 1)]
            finer = [factor * p for p in [*powers, 10.0 ** (first - 1)] for factor in (2, 5)]
            every = sorted(v for v in [*powers, *finer] if self.low <= v <= self.high)
            return every if len(every) <= 10 else powers
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _plot(axes: Axes, series: Sequence[Series], *, as_points: bool) -> str:
    drawn = [s for s in series if len(s.xs)]
    if not drawn:
        return ""
    x, y = _x_scale(axes, drawn), _y_scale(axes, drawn)
    name = escape(axes.title)
    labels = ", ".join(s.label for s in drawn)
    parts = [
        f"<figure><figcaption>{name}{_legend(drawn)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"<title>{name}</title>"
        f"<desc>{escape(axes.y_label)} against {escape(axes.x_label)}: {escape(labels)}</desc>",
        _grid(axes, x, y),
    ]
    for i, one in enumerate(drawn):
        parts.append(_dots(one, i, x, y) if as_points else _line(one, i, x, y))
    parts.append("</svg></figure>")
    return "".join(parts)


def _x_scale(axes: Axes, drawn: Sequence[Series]) -> _Scale:
    values = [v for s in drawn for v in s.xs]
    if axes.x_is_log:
        positive = [v for v in values if v > 0] or [1e-3]
        # Reads that brought several tokens have gaps of microseconds, which would fill the axis.
        low = max(min(positive), max(positive) / 1e5)
        return _Scale(low / 1.1, max(positive) * 1.1, LEFT, WIDTH - RIGHT, is_log=True)
    return _Scale(0.0, max([*values, 1e-9]), LEFT, WIDTH - RIGHT, is_log=False)


def _y_scale(axes: Axes, drawn: Sequence[Series]) -> _Scale:
    marks = [value for _, value in axes.marks_y]
    top = 1.0 if axes.y_is_share else 1.05 * max([*marks, 1e-9, *(v for s in drawn for v in s.ys)])
    return _Scale(0.0, top, HEIGHT - BOTTOM, TOP, is_log=False)


def _legend(drawn: Sequence[Series]) -> str:
    if len(drawn) < 2:
        return ""
    return "".join(f'<span class="key s{i}">{escape(s.label)}</span>' for i, s in enumerate(drawn))


def _grid(axes: Axes, x: _Scale, y: _Scale) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in y.ticks():
        text = f"{100 * value:.0f}%" if axes.y_is_share else _number(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value)}" y2="{y(value)}"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{text}</text>'
        )
    for value in x.ticks():
        parts.append(
            f'<line class="grid" x1="{x(value)}" x2="{x(value)}" y1="{TOP}" y2="{bottom}"/>'
            f'<text x="{x(value)}" y="{bottom + 14}" text-anchor="middle">{_number(value)}</text>'
        )
    for label, value in axes.marks_y:
        parts.append(
            f'<line class="mark" x1="{LEFT}" x2="{right}" y1="{y(value)}" y2="{y(value)}"/>'
            f'<text x="{right}" y="{y(value) - 4}" text-anchor="end">{escape(label)}</text>'
        )
    for label, value in axes.marks_x:
        if x.low <= value <= x.high:
            parts.append(
                f'<line class="mark" x1="{x(value)}" x2="{x(value)}" y1="{TOP}" y2="{bottom}"/>'
                f'<text x="{x(value) + 4}" y="{TOP + 10}">{escape(label)}</text>'
            )
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(axes.x_label)}</text>"
        f'<text transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(axes.y_label)}</text>"
    )
    return "".join(parts)


def _line(series: Series, i: int, x: _Scale, y: _Scale) -> str:
    path = " ".join(f"{x(a)},{y(b)}" for a, b in zip(series.xs, series.ys, strict=True))
    name = f"<title>{escape(series.label)}</title>"
    return f'<polyline class="line s{i}" points="{path}">{name}</polyline>'


def _dots(series: Series, i: int, x: _Scale, y: _Scale) -> str:
    """One path of dots: thousands of elements would make the page slow."""
    path = "".join(f"M{x(a)} {y(b)}h0" for a, b in zip(series.xs, series.ys, strict=True))
    return f'<path class="dots s{i}" d="{path}"/>'


def _thinned(series: Series) -> Series:
    every = math.ceil(len(series.xs) / MAX_POINTS)
    return series if every <= 1 else Series(series.label, series.xs[::every], series.ys[::every])


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
