"""A figure against what varies, as one SVG picture: points with error bars, the fitted law and its band."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from megarl.scaling.law import Law, fit
from megarl.scaling.study import Study
from megarl.scaling.table import Rows, lines

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 400, 74, 20, 44, 52
COLORS = ("#3a6ea8", "#d97b29", "#2b8a7b", "#8a5aa8", "#b3951f", "#c2476a")
Z = 1.96  # error bars are 95 % intervals of the mean


def laws(study: Study, rows: Rows, figure: str) -> dict[str, Law]:
    """The law of each line, through every cell (not through means)."""
    found = {}
    for name, line in lines(study, rows).items():
        there = [row for row in line if row.get(figure) is not None and row.get("fits", 1)]
        law = fit(np.array([row[study.x] for row in there]), np.array([row[figure] for row in there]))
        if law is not None:
            found[name] = law
    return found


def svg(study: Study, rows: Rows, points: Rows, figure: str) -> str:
    """The picture's source, both axes logarithmic; it refers to nothing outside itself. `rows` are cells."""
    shown = {name: [r for r in line if r.get(figure)] for name, line in lines(study, points).items()}
    xs = np.array([row[study.x] for line in shown.values() for row in line], dtype=float)
    ends = [v for line in shown.values() for row in line for v in _bar(row, figure)]
    x, y = _Axis(xs.min(), xs.max(), LEFT, WIDTH - RIGHT), _Axis(min(ends), max(ends), HEIGHT - BOTTOM, TOP)
    body = [_text(LEFT, 20, f"{study.name}: {figure.replace('_', ' ')} ({study.how})", 'font-size="14"')]
    for value in sorted(set(xs.tolist())):
        body.append(_text(x(value), HEIGHT - BOTTOM + 18, f"{value:g}", 'text-anchor="middle"'))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, study.x, 'text-anchor="middle"'))
    for value in y.ticks():
        body.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        body.append(_text(LEFT - 8, y(value) + 4, f"{value:g}", 'text-anchor="end"'))
    found = laws(study, rows, figure)
    for i, (name, line) in enumerate(shown.items()):
        color = COLORS[i % len(COLORS)]
        if name in found:
            body += _law(found[name], x, y, np.geomspace(line[0][study.x], line[-1][study.x], 40), color)
        for row in line:
            low, high = _bar(row, figure)
            here = x(row[study.x])
            body.append(f'<path d="M{here:.1f} {y(low):.1f}V{y(high):.1f}" stroke="{color}" stroke-width="2"/>')
            body.append(f'<circle cx="{here:.1f}" cy="{y(row[figure]):.1f}" r="4" fill="{color}"/>')
        label = " ".join(part for part in (name, str(found.get(name, ""))) if part)
        body.append(_text(LEFT + 10, TOP + 4 + 16 * i, label, f'fill="{color}"'))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>', *body, "</svg>\n"])


class _Axis:
    """Logarithmic positions, with a little room at both ends."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        room = max(0.05 * np.log(high / low), 0.02)
        self.low, self.high = np.log(low) - room, np.log(high) + room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        value = min(max(np.log(value), self.low - 9), self.high + 9)
        return float(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start))

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten in range; finer ones when those are too few."""
        for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), tuple(np.arange(1, 10, 0.1).round(1))):
            powers = range(int(np.floor(self.low / np.log(10))), int(np.ceil(self.high / np.log(10))) + 1)
            found = [s * 10.0**p for p in powers for s in steps if self.low <= np.log(s * 10.0**p) <= self.high]
            if len(found) >= 3:
                break
        return found[:: max(1, len(found) // 7)]


def _bar(row: dict[str, Any], figure: str) -> tuple[float, float]:
    """Ends of the error bar, both positive."""
    value, error = row[figure], Z * (row.get(f"{figure}_error") or 0.0)
    return max(value - error, value / 10), value + error


def _law(law: Law, x: _Axis, y: _Axis, at: np.ndarray, color: str) -> list[str]:
    def path(values: np.ndarray, along: np.ndarray) -> str:
        return "L".join(f"{x(a):.1f} {y(v):.1f}" for a, v in zip(along, values, strict=True))

    found = [f'<path d="M{path(law(at), at)}" fill="none" stroke="{color}" stroke-width="1.5"/>']
    low, high = law.band(at)
    if np.isfinite(high).all():
        outline = f"M{path(high, at)}L{path(low[::-1], at[::-1])}Z"
        found.insert(0, f'<path d="{outline}" fill="{color}" fill-opacity=".14"/>')
    return found


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{escape(text)}</text>'
