r"""A normalised text → the answer that it is (answers.py). Every sign of it is read, or `Unreadable` is raised."""

from __future__ import annotations

import re
from functools import partial, reduce

from megarl.rewards.answers import expressions, numerals, units, words
from megarl.rewards.answers.expressions import Unreadable
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
from megarl.rewards.answers.numerals import joined
from megarl.rewards.answers.regions import ALL, Region, Span, meet, merged, without
from megarl.rewards.answers.same import interval
from megarl.rewards.answers.scan import closing, outside, split, tokens

_AND = re.compile(r"(?<![a-zA-Z\\{])(and|or)(?![a-zA-Z}])|\\text\{\s*,?\s*(and|or)\s*,?\s*\}")
_CONNECTIVES = {r"\text{and}", r"\text{or}", r"\land", r"\lor"}
_SEPARATORS = {",", ";", r"\\", "&"} | _CONNECTIVES
_DOTS = Word("…")
_SIGNS = {"=", "<", ">", r"\leq", r"\geq", r"\neq", r"\approx", r"\in"}
_NOT_READ = {r"\to", r"\equiv", r"\notin", r"\sim", r"\cong", r"\subset", r"\subseteq", r"\Leftrightarrow", r"\pmod",
             r"\parallel", r"\perp", r"\mapsto", r"\propto", r"\cap", r"\ni", "?"}  # fmt: skip
_SAID = (
    r"(?:(?:so|thus|hence|therefore|then|we get|we have)\b,? ?)?"
    r"(?:(?:the )?(?:final |correct |right )?answer(?: is)?|it is|it's"
    r"|(?:the )?(?:value|result|solution|number|sum|total|probability|area|length)s?(?: is| are)"
    r"|approximately|approx\.?|about|roughly|exactly|around|is|are|equals|equal to)\b"
)
_LEAD_IN = re.compile(rf"(?:(?:{_SAID}|\\text\{{ ?{_SAID} ?:? ?\}}|\\approx|:|=)\s*)+", re.I)
_NAME = re.compile(r"[a-zA-Z]|\\[a-zA-Z]+|[A-Z]{2,4}|\\text\{[^{}]*\}|[a-zA-Z]{3,}")
_LETTER = (
    r"\\(?:[a-z]*(?:alpha|eta|gamma|epsilon|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega)"
    r"|[dD]elta|Gamma|Theta|Lambda|Sigma|Phi|Psi|Omega|ell)\b"
)
_BEFORE_NAME = (
    r"\\(?:angle|triangle|overline|vec|hat|bar|widehat|overrightarrow|tilde|mathbb|Delta|sin|cos|tan|log|ln|max|min) ?"
)
_LABEL = re.compile(
    rf"(?:{_BEFORE_NAME})*(?:\{{?[A-Z]{{1,4}}\}}?|\{{?[a-z]\}}?|{_LETTER} ?|\\text\{{[^{{}}]*\}}|\|[A-Za-z]+\|)"
    r"(?:_\{[^{}]*\}|'|\([^()=<>]*\))*"
)
_WIDE = re.compile(r"(?:[a-zA-Z]|\\frac)(?:[a-zA-Z+\-*/ ^_(){}|]|\\[a-zA-Z]+|(?<=[\^_]\{)\d+(?=\}))*")
_BASED = re.compile(
    r"\(?(?P<digits>[0-9A-F]+)\)?_\{(?:(?P<base>\d\d?)|(?:\\text\{)?(?P<word>[a-z]+)\}?)\}"
    r"|(?P<digits_before>[0-9A-F]+) ?(?:\\text\{ ?)?base ?(?P<base_after>\d\d?|[a-z]+) ?\}?"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
          "twelve": 12, "sixteen": 16, "binary": 2, "octal": 8, "hex": 16}  # fmt: skip
_MATRIX = re.compile(
    r"(?P<open>[(\[|]?) ?\\begin\{(?P<kind>[pbv]?matrix|smallmatrix|array)\}(?P<cells>.*)\\end\{(?P=kind)\} ?[)\]|]?",
    re.S,
)
_PROSE = re.compile(r"(?<![\\\w])[^\W\d_]{3,}")
_NEAR = 0.05  # relative
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?|\d\d?[-/.]\d\d?[-/.]\d{2,4}|\d+-\d+")  # and a range: no subtraction
_SETS = re.compile(r"\\mathbb\{([A-Z])\}(?:\^\{[^{}]*\}|_\{[^{}]*\}|\^?[+*])?")
_MOST_WORDS = 10  # of an answer; more is prose
_WHERE_NO_UNIT = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc) ?\(?[^()]*$")


def read(text: str) -> Answer:
    """Raises Unreadable."""
    text = _AND.sub(lambda found: rf" \text{{{found[1] or found[2]}}} ", _trimmed(text))
    if not text:
        raise Unreadable("nothing is there")
    if len(_PROSE.findall(text)) > _MOST_WORDS:
        raise Unreadable("prose")
    if numerals.read(text) is not None:
        return Expression(text)
    if _DATE.fullmatch(text) or (_SETS.fullmatch(text) and text != r"\mathbb{R}"):
        return Word(text.replace(" ", ""))
    for reader in (
        partial(words.choice, read=read),
        _half_open,
        _several,
        _bracketed,
        _matrix,
        _related,
        _united,
        _counted,
        _based,
        _ratio,
        _plus_minus,
        words.words,
    ):
        answer = reader(text)
        if answer is not None:
            return answer
    if set(tokens(text)) & (_NOT_READ | {r"\ldots"}) or "!!" in text:
        raise Unreadable(text)
    if r"\infty" in text:
        if expressions.number(text) is None:
            raise Unreadable(text)
    else:
        expressions.parse(text)
    return Expression(text)


def _trimmed(text: str) -> str:
    while True:
        short = text.strip().rstrip(".,;:").strip()
        short = re.sub(r"(?:\\\\|\\text\{[\s.,]*\})$", "", short)
        if short.startswith("{") and closing(short, 0) == len(short) - 1:
            short = short[1:-1]
        if (found := _LEAD_IN.match(short)) and found.end() < len(short):
            short = short[found.end() :]
        if short == text:
            return text
        text = short


# The kinds


def _several(text: str) -> Answer | None:
    parts, marks = split(outside(text, joined), _SEPARATORS)
    if not marks:
        return None
    for i, part in enumerate(parts):  # only "2, and 3" has nothing between two marks
        if not part and (i in (0, len(marks)) or marks[i] not in _CONNECTIVES):
            raise Unreadable("a comma with nothing beside it")
    items: list[Answer] = []
    for part in filter(None, parts):
        item = _item(part)
        items += item.items if isinstance(item, Items) and not item.is_set else [item]
    regions = [item for item in items if isinstance(item, Region)]
    joints = set(marks) & _CONNECTIVES
    if len(regions) == len(items) and len(joints) == 1:
        if joints <= {r"\text{and}", r"\land"}:
            return reduce(meet, regions)
        if len({region.variable for region in regions}) == 1:
            return Region(merged([span for region in regions for span in region.spans]).spans, regions[0].variable)
    return Items(tuple(items), goes_on=_DOTS in items)


def _item(text: str) -> Answer:
    return _DOTS if text == r"\ldots" else read(text)


def _half_open(text: str) -> Answer | None:
    """`]0, 1[`."""
    if found := re.fullmatch(r"\]([^\[\]]*[,;][^\[\]]*)([\[\]])|\[([^\[\]]*[,;][^\[\]]*)\[", text):  # ]0, 1[
        inner, opens, closes = found[1] or found[3], "(" if text[0] == "]" else "[", ")" if text[-1] == "[" else "]"
        return Row(opens, tuple(read(part) for part in _parts(inner)), closes)
    return None


def _bracketed(text: str) -> Answer | None:
    if text.startswith(r"\{") and closing(text, 0) == len(text) - 1:
        return _set(text[2:-2].strip())
    opens = r"\langle" if text.startswith(r"\langle") else text[0]
    if opens not in ("(", "[", r"\langle") or closing(text, 0) != len(text) - 1:
        return None
    inner = text[len(opens) : -len(r"\rangle") if opens == r"\langle" else -1].strip()
    parts = _parts(inner)
    if len(parts) == 1:
        return read(inner) if opens != r"\langle" and not re.search(r"\\pmod|\\ldots", inner) else None
    items = tuple(map(_item, parts))
    return Row("(" if opens == r"\langle" else opens, items, ")" if opens == r"\langle" else text[-1])


def _parts(inner: str) -> list[str]:
    text = joined(inner)
    if "," in inner and len(split(text, {",", ";"})[0]) == 1:
        text = inner  # (100,200) is a pair
    parts = split(text, {",", ";"})[0]
    if len(parts) > 1 and not all(parts):
        raise Unreadable("a comma with nothing beside it")
    return parts


def _set(inner: str) -> Answer:
    if not inner:
        return Word("nosolution")
    sides, marks = split(inner, {"|", ":"})
    if len(sides) == 2 and re.match(r"\(?[a-zA-Z](?:_\{\w+\})?\b", sides[0]):
        found = read(sides[1])
        if isinstance(found, Region):
            return found
        raise Unreadable(inner)
    items = tuple(map(_item, _parts(inner)))
    return Items(items, is_set=True, goes_on=_DOTS in items)


def _matrix(text: str) -> Answer | None:
    found = _MATRIX.fullmatch(text)
    if found is None:
        return None
    if "begin" in found["cells"]:
        raise Unreadable("a matrix in a matrix")
    rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", found["cells"]) if row.strip()]
    grid = tuple(tuple(read(cell) for cell in row.split("&")) for row in rows)
    if len({len(row) for row in grid}) != 1:
        raise Unreadable("rows of several lengths")
    return Grid(grid, found["kind"] == "vmatrix" or found["open"] == "|")


def _related(text: str) -> Answer | None:
    sides, signs = split(text, _SIGNS)
    if not signs:
        return None
    if not all(sides):
        raise Unreadable("a relation with one side")
    if set(signs) <= {"=", r"\approx"}:
        return _equation(sides, signs)
    if signs == [r"\in"]:
        value = read(sides[1])
        if not _NAME.fullmatch(sides[0]):
            raise Unreadable(text)
        if isinstance(value, Row):
            value = interval(value) or value
        return value if isinstance(value, Region) else Named(sides[0], value)
    if set(signs) - {"<", ">", r"\leq", r"\geq", r"\neq"}:
        raise Unreadable(text)
    if (region := _inequality(sides, signs)) is not None:
        return region
    for side in sides:
        expressions.parse(side)
    return Relation(tuple(sides), tuple(signs))


def _equation(sides: list[str], signs: list[str]) -> Answer:
    if len(sides) == 2 and signs == ["="] and _label(sides[1]) and not _label(sides[0]):
        sides = sides[::-1]
    name, *rest = sides
    if _label(name):
        return Named(_name_of(name), _values(rest, signs[1:]))
    if all(expressions.number(side) is not None for side in sides):
        return _values(sides, signs)
    wide = _WIDE.fullmatch(name) is not None and len(set(re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", " ", name)))) > 1
    if wide and len(sides) >= 2 and expressions.number(sides[-1]) is not None:
        value = _values(rest, signs[1:])
        if len(sides) == 2 and signs == ["="]:
            return Either((Named(_name_of(name), value, wide=True), Relation(tuple(sides), ("=",))))
        return Named(_name_of(name), value, wide=True)
    for side in sides:
        expressions.parse(side)
    if signs != ["="]:
        raise Unreadable(" = ".join(sides))
    return Relation(tuple(sides), ("=",))


def _values(sides: list[str], signs: list[str]) -> Answer:
    """The value of `a = b = c`, whose sides must agree; of `a \\approx b` either."""
    groups: list[list[str]] = [[sides[0]]]
    for side, sign in zip(sides[1:], signs, strict=True):
        if sign == "=":
            groups[-1].append(side)
        else:
            groups.append([side])
    readings: list[Answer] = []
    for group in groups:
        values = [read(side) for side in group if not (_label(side) and len(group) > 1 and side != group[-1])]
        for value in values[:-1]:
            plain = isinstance(value, Expression) and isinstance(values[-1], Expression)
            if not plain or not expressions.equal(value.text, values[-1].text):  # type: ignore[union-attr]
                raise Unreadable(" = ".join(group))
        readings.append(values[-1])
    if len(readings) > 1 and not _are_near(readings):
        raise Unreadable("sides that are not nearly the same")
    return readings[0] if len(readings) == 1 else Either(tuple(readings))


def _are_near(readings: list[Answer]) -> bool:
    """Whether what `\\approx` joins are numbers that one may take for each other."""
    numbers = [expressions.number(r.text) if isinstance(r, Expression) else None for r in readings]
    known = [float(n) for n in numbers if n is not None]
    return len(known) == len(numbers) and max(known) - min(known) <= _NEAR * max(map(abs, known))


def _label(text: str) -> bool:
    return (
        _LABEL.fullmatch(text) is not None
        and text not in (r"\pi", "e", "i", r"\infty")
        and not text.startswith("\\frac")
    )


def _name_of(name: str) -> str:
    return re.sub(r"\\text\b|\s|[{}]", "", name)


def _inequality(sides: list[str], signs: list[str]) -> Region | None:
    """`x > 4`, `1 < x \\leq 3` and `x \\neq 2` as sets of real numbers. None for other inequalities."""
    variables = [i for i, side in enumerate(sides) if _NAME.fullmatch(side) and side not in (r"\pi", "e", r"\infty")]
    ends = [expressions.number(side) for i, side in enumerate(sides) if i not in variables]
    if len(variables) != 1 or any(end is None for end in ends):
        return None
    place = variables[0]
    region = Region(ALL.spans, _name_of(sides[place]))
    for i, sign in enumerate(signs):
        if place not in (i, i + 1):
            return None
        end = expressions.number(sides[i + 1 if place == i else i])
        assert end is not None
        upwards = (sign in (">", r"\geq")) == (place == i)
        if sign == r"\neq":
            region = without(region, [end])
        elif upwards:
            region = meet(region, merged([Span(end, sign == ">" or sign == "<", float("inf"), True)]))
        else:
            region = meet(region, merged([Span(float("-inf"), True, end, sign == ">" or sign == "<")]))
    return region


def _united(text: str) -> Answer | None:
    r"""Sets of real numbers: `\mathbb{R}`, `A \cup B`, `\mathbb{R} \setminus \{0\}`."""
    if text == r"\emptyset":
        return Word("nosolution")
    if text == r"\mathbb{R}" or words.letters_of(text) == "allrealnumbers":
        return ALL
    kept, removed = split(text, {r"\setminus"})
    if removed:
        region, *points = [_region(read(part)) for part in kept]
        ends = [span.low for point in points for span in point.spans]
        if any(span.low != span.high for point in points for span in point.spans):
            raise Unreadable(text)
        return without(region, ends)
    parts, marks = split(text, {r"\cup"})
    if not marks:
        return None
    answers = [read(part) for part in parts]
    if all(isinstance(a, Items) and a.is_set for a in answers):
        return Items(tuple(i for a in answers if isinstance(a, Items) for i in a.items), is_set=True)
    return merged([span for answer in answers for span in _region(answer).spans])


def _region(answer: Answer) -> Region:
    """An interval, or the points of a set, as real numbers. Raises Unreadable for anything else."""
    if isinstance(answer, Region):
        return answer
    if isinstance(answer, Row) and (found := interval(answer)) is not None:
        return found
    spans = []
    for item in answer.items if isinstance(answer, Items) else (answer,):
        number = expressions.number(item.text) if isinstance(item, Expression) else None
        if number is None:
            raise Unreadable("a union of what are no real numbers")
        spans.append(Span(number, False, number, False))
    return merged(spans)


def _counted(text: str) -> Answer | None:
    value, unit = units.split(text)
    if (not unit and value == text) or (unit == "degree" and _WHERE_NO_UNIT.search(value)):
        return None
    try:
        answer = read(value)
    except Unreadable:
        return None
    if isinstance(answer, Word | Choice | Items):
        return None
    return Quantity(answer, unit) if unit else answer


def _based(text: str) -> Answer | None:
    found = _BASED.fullmatch(joined(text))
    if found is None:
        return None
    base = found["base"] or found["word"] or found["base_after"]
    number = int(base) if base.isdigit() else _BASES.get(base)
    if number is None or not 2 <= number <= 36:
        return None
    digits = found["digits"] or found["digits_before"]
    return Based(digits, number) if all(int(d, 36) < number for d in digits) else None


def _ratio(text: str) -> Answer | None:
    parts, marks = split(text, {":"})
    if not marks or not all(parts):
        return None
    return Ratio(tuple(read(part) for part in parts))


def _plus_minus(text: str) -> Answer | None:
    if r"\pm" not in text and r"\mp" not in text:
        return None
    upper = read(text.replace(r"\pm", "+").replace(r"\mp", "-").lstrip("+ "))
    return Items((upper, read(text.replace(r"\pm", "-").replace(r"\mp", "+").lstrip("+ "))), is_set=True)
