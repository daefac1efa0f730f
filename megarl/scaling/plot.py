"""A metric against what varies, as one SVG picture: points with error bars, the fitted law and its band."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from megarl.errors import UserError
from megarl.scaling.law import Law, fit, student
from megarl.scaling.study import Study
from megarl.scaling.table import Rows, lines

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 74, 20, 36, 52
LINE = 17  # of text
COLORS = ("#3a6ea8", "#b5611a", "#23776b", "#8a5aa8", "#7f6a10", "#c2476a")  # readable on white as text, too
LABEL = 44  # pixels that a number below the axis takes


def laws(study: Study, rows: Rows, metric: str) -> dict[str, Law]:
    """The law of each line, through every cell and not through means. A metric of the summary alone has no law."""
    found = {}
    for name, line in lines(study, rows).items():
        there = [row for row in line if row.get(metric) is not None and row.get("fits", 1)]
        law = fit(np.array([row[study.x] for row in there]), np.array([row[metric] for row in there]))
        if law is not None:
            found[name] = law
    return found


def svg(study: Study, rows: Rows, points: Rows, metric: str) -> str:
    """The picture's source, which refers to no other file. `rows` are cells, `points` their summary.

    An axis is logarithmic if all its values are positive. Raises UserError when no point has the metric.
    """
    shown = {name: [r for r in line if r.get(metric) is not None] for name, line in lines(study, points).items()}
    xs = sorted({float(row[study.x]) for line in shown.values() for row in line})
    if not xs:
        raise UserError(f"y: no point has {metric} for all its seeds")
    found = laws(study, rows, metric)
    labels = [": ".join(part for part in (name, str(found.get(name, ""))) if part) for name in shown]
    top = TOP + LINE * sum(map(bool, labels))
    x = _Axis(xs, LEFT, WIDTH - RIGHT)
    ends = [v for line in shown.values() for row in line for v in _bar(row, metric)]
    bands = [v for law in found.values() for v in np.concatenate(law.band(np.array([xs[0], xs[-1]])))]
    inside = [v for v in bands if min(ends) / 2 < v < 2 * max(ends)]  # a band wider than that may leave the picture
    y = _Axis([*ends, *inside], HEIGHT - BOTTOM, top)
    body = [_text(LEFT, 22, f"{study.name}: {metric.replace('_', ' ')} ({study.how})", 'font-size="14"')]
    for value in _apart(xs, x):
        body.append(_text(x(value), HEIGHT - BOTTOM + 18, _short(value), 'text-anchor="middle"'))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, study.x, 'text-anchor="middle"'))
    for value in y.ticks():
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        body.append(_text(LEFT - 8, y(value) + 4, f"{value:g}", 'text-anchor="end"'))
    for i, ((name, line), label) in enumerate(zip(shown.items(), labels, strict=True)):
        color = COLORS[i % len(COLORS)]
        if name in found and line:
            body += _law(found[name], x, y, np.geomspace(line[0][study.x], line[-1][study.x], 40), color)
        for row in line:
            low, high = _bar(row, metric)
            here = x(row[study.x])
            body.append(f'<path d="M{here:.1f} {y(low):.1f}V{y(high):.1f}" stroke="{color}" stroke-width="2"/>')
            body.append(f'<circle cx="{here:.1f}" cy="{y(row[metric]):.1f}" r="4" fill="{color}"/>')
        body.append(_text(LEFT, TOP + 4 + LINE * i, label, f'fill="{color}"'))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    frame = f'<clipPath id="frame"><rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}"'
    frame += f' height="{HEIGHT - BOTTOM - top}"/></clipPath>'
    body = ['<rect width="100%" height="100%" fill="white"/>', frame, *body]
    return "\n".join([f'{head} font-size="12">', *body, "</svg>\n"])


class _Axis:
    """Positions of numbers, with a little room at both ends. Logarithmic if all of them are positive."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.logarithmic = min(values) > 0
        low, high = self._scaled(min(values)), self._scaled(max(values))
        room = 0.05 * (high - low) or max(0.02, 0.02 * abs(low))
        self.low, self.high = low - room, high + room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            value = max(value, np.exp(self.low - 9))  # a band that goes to 0 leaves the picture
        return float(self.start + (self._scaled(value) - self.low) / (self.high - self.low) * (self.end - self.start))

    def ticks(self) -> list[float]:
        """Round numbers in range, about 4 to 7 of them."""
        if not self.logarithmic:
            return _round(self.low, self.high)
        low, high = np.exp(self.low), np.exp(self.high)
        if high / low < 6:
            return _round(low, high)
        powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        found = [s * 10.0**p for p in powers for s in (1, 2, 5) if low <= s * 10.0**p <= high]
        return found if len(found) <= 8 else [10.0**p for p in powers if low <= 10.0**p <= high]

    def _scaled(self, value: float) -> float:
        return float(np.log(value)) if self.logarithmic else float(value)


def _round(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, 4 to 8 of them from `low` to `high`."""
    power = 10.0 ** np.floor(np.log10((high - low) / 4))
    step = next(s * power for s in (10, 5, 2, 1) if s * power * 4 <= high - low)
    return [float(f"{n * step:.9g}") for n in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _short(value: float) -> str:
    """300k, 2.4M, 57M; plain below a hundred thousand."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 1e5):
            return f"{value / size:.{0 if value >= 10 * size else 1}f}{letter}"
    return f"{value:g}"


def _apart(values: Sequence[float], axis: _Axis) -> list[float]:
    """The values whose labels do not touch."""
    found: list[float] = []
    for value in values:
        if not found or axis(value) - axis(found[-1]) >= LABEL:
            found.append(value)
    return found


def _bar(row: dict[str, Any], metric: str) -> tuple[float, float]:
    """Ends of the mean's 95% interval over seeds. That of a positive metric stays positive, for the logarithm."""
    value, error = row[metric], row.get(f"{metric}_error") or 0.0
    half = error * student(row["seeds"] - 1) if error else 0.0
    return (max(value - half, value / 10) if value > 0 else value - half), value + half


def _law(law: Law, x: _Axis, y: _Axis, at: np.ndarray, color: str) -> list[str]:
    def path(values: np.ndarray, along: np.ndarray) -> str:
        return "L".join(f"{x(a):.1f} {y(v):.1f}" for a, v in zip(along, values, strict=True))

    clip = 'clip-path="url(#frame)"'
    found = [f'<path d="M{path(law(at), at)}" fill="none" stroke="{color}" stroke-width="1.5" {clip}/>']
    low, high = law.band(at)
    if np.isfinite(high).all():
        outline = f"M{path(high, at)}L{path(low[::-1], at[::-1])}Z"
        found.insert(0, f'<path d="{outline}" fill="{color}" fill-opacity=".14" {clip}/>')
    return found


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{escape(text)}</text>'
