"""Sets of real numbers as spans between two ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

Number = Fraction | float  # a float only for ±inf


@dataclass(frozen=True, slots=True)
class Span:
    low: Number
    low_open: bool
    high: Number
    high_open: bool


@dataclass(frozen=True, slots=True)
class Region:
    """Real numbers: sorted spans that do not touch. `variable`: whose; "" for any."""

    spans: tuple[Span, ...]
    variable: str = ""


ALL = Region((Span(-math.inf, True, math.inf, True),))


def merged(spans: Sequence[Span]) -> Region:
    out: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.low, s.low_open)):
        if out and (
            span.low < out[-1].high or (span.low == out[-1].high and not (span.low_open and out[-1].high_open))
        ):
            last = out[-1]
            high, high_open = max((last.high, not last.high_open), (span.high, not span.high_open))
            out[-1] = Span(last.low, last.low_open, high, not high_open)
        else:
            out.append(span)
    return Region(tuple(out))


def meet(a: Region, b: Region) -> Region:
    """The numbers that are in both."""
    spans = []
    for x in a.spans:
        for y in b.spans:
            low, low_open = max((x.low, x.low_open), (y.low, y.low_open))
            high, closed = min((x.high, not x.high_open), (y.high, not y.high_open))
            if low < high or (low == high and not low_open and closed):
                spans.append(Span(low, low_open, high, not closed))
    return Region(merged(spans).spans, a.variable or b.variable)


def without(region: Region, points: Sequence[Number]) -> Region:
    """The region less some points."""
    ends = [-math.inf, *sorted(points), math.inf]
    gaps = Region(tuple(Span(low, True, high, True) for low, high in pairwise(ends)))
    return meet(region, gaps)
