"""A plan as one SVG picture: memory of each stage against the GPU's, and where the step's time goes."""

from __future__ import annotations

from html import escape

from megarl.planner.hardware import GIB
from megarl.planner.job import Plan

WIDTH, BAR, GAP, LEFT = 760, 18, 6, 90
COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2", "#ff9da7", "#9c755f", "#bab0ac")


def svg(plan: Plan) -> str:
    """The picture's source, without external references."""
    memory = [(f"stage {s.stage}", {k: v / GIB for k, v in s.parts.items() if v}) for s in plan.stages]
    time = [("step", dict(plan.seconds)), ("update", {k: v for k, v in plan.train.parts.items() if v})]
    top, body = 24, []
    body.append(_text(8, 16, f"Memory, GiB of {plan.gpu.memory:g} ({plan.gpu.name})"))
    limit = max(plan.gpu.memory, *(sum(parts.values()) for _, parts in memory))
    names = list(dict.fromkeys(name for _, parts in memory for name in parts))
    for label, parts in memory:
        body += _bar(label, parts, names, top, limit)
        top += BAR + GAP
    edge = LEFT + plan.gpu.memory / limit * (WIDTH - LEFT - 10)
    body.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="24" y2="{top}" stroke="black" stroke-dasharray="4 3"/>')
    body += _legend(names, top + 12)
    top += 44
    body.append(_text(8, top, "Time, seconds"))
    for label, parts in time:
        top += 8
        body += _bar(label, parts, list(parts), top, sum(parts.values()))
        body += _legend([f"{name} {value:.3g}" for name, value in parts.items()], top + BAR + 14)
        top += BAR + 34
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top + 10}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="11">', *body, "</svg>\n"])


def _bar(label: str, parts: dict[str, float], names: list[str], top: float, limit: float) -> list[str]:
    found, left = [_text(8, top + 13, label)], float(LEFT)
    for name, value in parts.items():
        width = value / limit * (WIDTH - LEFT - 10)
        color = COLORS[names.index(name) % len(COLORS)]
        found.append(
            f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" fill="{color}">'
            f"<title>{escape(name)}: {value:.3g}</title></rect>"
        )
        left += width
    return found


def _legend(names: list[str], top: float) -> list[str]:
    found, left = [], 8.0
    for i, name in enumerate(names):
        found.append(f'<rect x="{left:.0f}" y="{top - 8}" width="8" height="8" fill="{COLORS[i % len(COLORS)]}"/>')
        found.append(_text(left + 11, top, name))
        left += 18 + 5.6 * len(name)
    return found


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'
