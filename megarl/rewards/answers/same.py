r"""When two answers are the same.

Lists in any order, tuples in theirs, intervals by their ends, units and percent where both have them, words by their
letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megarl.rewards.answers import expressions
from megarl.rewards.answers.kinds import (
    Answer,
    Based,
    Choice,
    Either,
    Expression,
    Grid,
    Items,
    Named,
    Quantity,
    Ratio,
    Relation,
    Row,
    Word,
)
from megarl.rewards.answers.regions import Region, Span, merged

_FLIPPED = {"<": ">", r"\leq": r"\geq", ">": "<", r"\geq": r"\leq", "=": "=", r"\neq": r"\neq"}
_FUNCTION = re.compile(r"y|[a-zA-Z]\([a-zA-Z]\)")


def same(given: Answer, wanted: Answer) -> bool:
    """Whether the answer that was given is the one that was wanted."""
    given, wanted = _single(given), _single(wanted)
    if isinstance(given, Either):
        return any(same(reading, wanted) for reading in given.readings)
    if isinstance(wanted, Either):
        return any(same(given, reading) for reading in wanted.readings)
    if type(given) is type(wanted):
        return bool(_ALIKE[type(given)](given, wanted))
    for a, b in ((given, wanted), (wanted, given)):
        compare = _MIXED.get((type(a), type(b)))
        if compare is not None:
            return bool(compare(a, b, a is given))
    for a, b in ((given, wanted), (wanted, given)):
        compare = _WITH_ANY.get(type(a))
        if compare is not None:
            return bool(compare(a, b, a is given))
    return False


def _turned(a: Answer, b: Answer, given: bool) -> bool:
    """`same`, where `a` is the one that was given, or else the one that was wanted."""
    return same(a, b) if given else same(b, a)


def _single(answer: Answer) -> Answer:
    """`7` for `\\{7\\}` and for `7 = 7 or 7`: several answers that are all the same."""
    while isinstance(answer, Items) and not answer.goes_on and len(_distinct(answer.items)) == 1:
        answer = answer.items[0]
    return answer


# Of one kind


def _expressions(a: Expression, b: Expression) -> bool:
    if a.text.replace(" ", "") == b.text.replace(" ", ""):
        return True
    ends = [expressions.number(side.text) if r"\infty" in side.text else None for side in (a, b)]
    if ends != [None, None]:
        return ends[0] == ends[1]
    return expressions.equal(a.text, b.text)


def _words(a: Word, b: Word) -> bool:
    return a.text == b.text


def _choices(a: Choice, b: Choice) -> bool:
    return a.letter == b.letter and (a.beside is None or b.beside is None or same(a.beside, b.beside))


def _quantities(a: Quantity, b: Quantity) -> bool:
    return a.unit == b.unit and same(a.value, b.value)


def _based(a: Based, b: Based) -> bool:
    return (a.digits.lstrip("0"), a.base) == (b.digits.lstrip("0"), b.base)


def _ordered(a: Sequence[Answer], b: Sequence[Answer]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def _unordered(a: Sequence[Answer], b: Sequence[Answer]) -> bool:
    left = list(b)
    for item in a:
        found = next((i for i, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        del left[found]
    return not left


def _items(a: Items, b: Items) -> bool:
    if a.goes_on or b.goes_on:
        return _ordered(a.items, b.items)
    if (spans := union(a.items)) and (others := union(b.items)):
        return spans.spans == others.spans
    one, other = list(a.items), list(b.items)
    if a.is_set or b.is_set:
        one, other = _distinct(one), _distinct(other)
    names = [{i.name for i in side if isinstance(i, Named)} for side in (one, other)]
    if sorted(map(len, names))[0] == 0 and max(map(len, names)) > 1:  # 3, 4 for x = 3, y = 4
        return _ordered(one, other)
    return _unordered(one, other)


def _distinct(items: Sequence[Answer]) -> list[Answer]:
    kept: list[Answer] = []
    for item in items:
        if not any(same(item, other) for other in kept):
            kept.append(item)
    return kept


def _rows(a: Row, b: Row) -> bool:
    brackets = (a.opens, a.closes) == (b.opens, b.closes)
    return (brackets or len(a.items) > 2) and _ordered(a.items, b.items)


def _grids(a: Grid, b: Grid) -> bool:
    if a.bars != b.bars or len(a.rows) != len(b.rows):
        return False
    return all(_ordered(x, y) for x, y in zip(a.rows, b.rows, strict=True))


def _regions(a: Region, b: Region) -> bool:
    return a.spans == b.spans and (not a.variable or not b.variable or a.variable == b.variable)


def _named(a: Named, b: Named) -> bool:
    if a.name == b.name or (_FUNCTION.fullmatch(a.name) and _FUNCTION.fullmatch(b.name)):
        return same(a.value, b.value)
    return False


def _relations(a: Relation, b: Relation) -> bool:
    if len(a.signs) != len(b.signs):
        return False
    if len(a.signs) > 1:
        turned = Relation(b.sides[::-1], tuple(_FLIPPED[s] for s in b.signs[::-1]))
        return any(
            a.signs == other.signs and all(expressions.equal(x, y) for x, y in zip(a.sides, other.sides, strict=True))
            for other in (b, turned)
        )
    (x, y), (v, w), (sign,), (other,) = a.sides, b.sides, a.signs, b.signs
    if sign in ("=", r"\neq"):
        return sign == other and expressions.proportional((x, y), (v, w), positive=False)
    return (sign == other and expressions.proportional((x, y), (v, w), positive=True)) or (
        _FLIPPED[sign] == other and expressions.proportional((x, y), (w, v), positive=True)
    )


# Of two kinds


def _word_and_expression(a: Word, b: Expression, given: bool) -> bool:
    """`abc` is a product beside `a \\cdot b \\cdot c`, where letters are multiplied for all to see."""
    if not re.fullmatch("[a-z]{2,4}", a.written) or re.fullmatch("[a-zA-Z]+", b.text):
        return False
    return expressions.equal(a.written, b.text)


def _choice_and_expression(a: Choice, b: Expression, given: bool) -> bool:
    """`(b)` for B; but B is not the variable b."""
    if not given and a.letter in "ABCDE" and re.fullmatch(rf"\(? ?{a.letter} ?\)?", b.text, re.I):
        return True
    return _choice_and_any(a, b, given)


def _items_and_row(a: Items, b: Row, given: bool) -> bool:
    """`1, 2` for the point `(1, 2)`, and that for `x = 1, y = 2`; never an interval."""
    return (
        (given or any(isinstance(item, Named) for item in a.items))
        and not a.is_set
        and not a.goes_on
        and (b.opens, b.closes) == ("(", ")")
        and not _infinite(b)
        and (_ordered(a.items, b.items) if given else _ordered(b.items, a.items))
    )


def _infinite(row: Row) -> bool:
    return any(isinstance(i, Expression) and r"\infty" in i.text for i in row.items)


def _items_and_region(a: Items, b: Region, given: bool) -> bool:
    spans = union(a.items)
    return spans is not None and spans.spans == b.spans


def _row_and_region(a: Row, b: Region, given: bool) -> bool:
    region = interval(a)
    return region is not None and region.spans == b.spans


def _grid_and_row(a: Grid, b: Row, given: bool) -> bool:
    """A column or a row of numbers for a point's coordinates."""
    if a.bars or b.opens == "[" or (len(a.rows) > 1 and len(a.rows[0]) > 1):
        return False
    return _ordered([item for row in a.rows for item in row], b.items)


def _named_and_relation(a: Named, b: Relation, given: bool) -> bool:
    return isinstance(a.value, Expression) and _relations(Relation((a.name, a.value.text), ("=",)), b)


_ALIKE: dict[type, Any] = {
    Expression: _expressions, Word: _words, Choice: _choices, Quantity: _quantities, Based: _based, Items: _items,
    Ratio: lambda a, b: _ordered(a.parts, b.parts), Row: _rows, Grid: _grids, Region: _regions, Named: _named,
    Relation: _relations,
}  # fmt: skip
_MIXED: dict[tuple[type, type], Any] = {
    (Word, Expression): _word_and_expression, (Choice, Expression): _choice_and_expression,
    (Items, Row): _items_and_row, (Items, Region): _items_and_region,
    (Row, Region): _row_and_region, (Grid, Row): _grid_and_row, (Named, Relation): _named_and_relation,
}  # fmt: skip


# Of one kind and any other


def _named_and_any(a: Named, b: Answer, given: bool) -> bool:
    return (given or not a.wide) and _turned(a.value, b, given)


def _quantity_and_any(a: Quantity, b: Answer, given: bool) -> bool:
    if _turned(a.value, b, given):
        return True
    return (
        a.unit == "%"
        and isinstance(a.value, Expression)
        and isinstance(b, Expression)
        and expressions.equal(rf"\frac{{{a.value.text}}}{{100}}", b.text)
    )


def _choice_and_any(a: Choice, b: Answer, given: bool) -> bool:
    return a.beside is not None and _turned(a.beside, b, given)


_WITH_ANY: dict[type, Any] = {Named: _named_and_any, Choice: _choice_and_any, Quantity: _quantity_and_any}


# Intervals


def interval(row: Row) -> Region | None:
    """The real numbers between two ends. None if they are none, or in the wrong order."""
    if len(row.items) != 2 or row.opens not in "([" or row.closes not in ")]":
        return None
    low, high = (expressions.number(i.text) if isinstance(i, Expression) else None for i in row.items)
    if low is None or high is None or not low < high:
        return None
    return merged([Span(low, row.opens == "(", high, row.closes == ")")])


def union(items: Sequence[Answer]) -> Region | None:
    """The union of what are all intervals for sure: one of them is not a pair in round brackets."""
    rows = [item for item in items if isinstance(item, Row)]
    if len(rows) < len(items) or not any(_infinite(row) or "[" in row.opens or "]" in row.closes for row in rows):
        return None
    regions = [interval(row) for row in rows]
    if any(region is None for region in regions):
        return None
    return merged([span for region in regions if region is not None for span in region.spans])
