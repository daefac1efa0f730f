"""The kinds of answers."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.rewards.answers.regions import Region


@dataclass(frozen=True, slots=True)
class Expression:
    text: str


@dataclass(frozen=True, slots=True)
class Word:
    """Letters that are not multiplied: a name, a weekday, yes or no, the order of runners. Lower case, no blanks."""

    text: str
    written: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A letter of a multiple choice, and what stands beside it."""

    letter: str
    beside: Answer | None = None


@dataclass(frozen=True, slots=True)
class Quantity:
    value: Answer
    unit: str  # in one spelling; "%" is a unit too


@dataclass(frozen=True, slots=True)
class Based:
    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """`3:4` and `12:30`: neither is reduced."""

    parts: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Items:
    """Several answers, in any order. In a set, repeated ones count once."""

    items: tuple[Answer, ...]
    is_set: bool = False
    goes_on: bool = False  # has dots: the order counts


@dataclass(frozen=True, slots=True)
class Row:
    """A tuple, a point, a vector or an interval: ordered, within brackets."""

    opens: str
    items: tuple[Answer, ...]
    closes: str


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix. `bars`: its determinant."""

    rows: tuple[tuple[Answer, ...], ...]
    bars: bool = False


@dataclass(frozen=True, slots=True)
class Named:
    """`x = 3`: what is left of it, and its value. `wide`: the left side is a sum, which only a response may have."""

    name: str
    value: Answer
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Relation:
    """`2x + y = 5`, `x \\neq 2`, `a < b \\leq c`: sides as text."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """Readings that mean the same: `5\\sqrt2 \\approx 7.07`."""

    readings: tuple[Answer, ...]


Answer = Expression | Word | Choice | Quantity | Based | Ratio | Items | Row | Region | Grid | Named | Relation | Either
