r"""Written numbers → exact fractions: `1,234.50`, `12 000`, `1 3/4`, `2.5 \times 10^{-3}`, `0.\overline{3}`."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 4000  # digits: Python reads no longer integers

_GROUPS = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,3}(?:'\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:\.\d{3}){2,}"
_GROUPED = re.compile(rf"(?<![\d,.])(?:{_GROUPS})(?!\d|[,']\d)")
_DIGITS = r"(?:\d+(?:\.\d*)?|\.\d+)"
_POWER = r"(?: ?(?:\\times|\\cdot) ?10\^\{(?P<power>[+-]?\d{1,4})\}|[eE](?P<e>[+-]?\d{1,4}))"
_DECIMAL = re.compile(rf"(?P<digits>{_DIGITS}){_POWER}?")
_FRACTION = re.compile(r"(?:(?P<whole>\d+) ?)?\\frac\{ ?(?P<top>-?\d+) ?\}\{ ?(?P<bottom>-?\d+) ?\}")
_SLASHED = re.compile(r"(?:(?P<whole>\d+) )?(?P<top>\d+) ?/ ?(?P<bottom>-?\d+)")
_REPEATING = re.compile(
    r"(?P<whole>\d*)\.(?P<fixed>\d*)"
    r"(?:\\(?:overline|bar)\{(?P<bar>\d+)\}|\((?P<round>\d+)\)|\\dot\{(?P<first>\d)\}(?:(?P<inner>\d*)\\dot\{(?P<last>\d)\})?)"
)
_GOES_ON = re.compile(r"(?P<whole>\d*)\.(?P<fixed>\d*?)(?P<digit>\d)(?P=digit){2,} ?\\ldots")
_SPACED = re.compile(r"(\d*\.\d{3}(?: \d{3})*) (\d{1,3})(?!\d)")
_SIGN = re.compile(r"(?P<sign>[+-]?) ?(?P<rest>.*)", re.S)


def joined(text: str) -> str:
    """Digit groups as one number: `12,000.50` → `12000.50`. Other commas and spaces stay."""
    return _GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text)


def read(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else. None if it is something else."""
    found = _SIGN.fullmatch(joined(text))
    assert found is not None
    value = _unsigned(found["rest"]) if len(text) <= LONGEST else None
    return value if value is None or found["sign"] != "-" else -value


def digits(text: str) -> int:
    """How many significant digits a decimal is written with; 0 for anything else."""
    found = _DECIMAL.fullmatch(joined(text).lstrip("+- "))
    if found is None or "." not in found["digits"]:
        return 0
    return len(found["digits"].replace(".", "").lstrip("0"))


def _unsigned(text: str) -> Fraction | None:
    while spaced := _SPACED.fullmatch(text):  # 3.141 592
        text = spaced[1] + spaced[2]
    if found := _DECIMAL.fullmatch(text):
        power = int(found["power"] or found["e"] or 0)
        return Fraction(found["digits"].rstrip(".") or "0") * Fraction(10) ** power
    if found := _FRACTION.fullmatch(text) or _SLASHED.fullmatch(text):
        top, bottom = int(found["top"]), int(found["bottom"])
        if bottom == 0 or (found["whole"] and (top < 0 or bottom < 0)):
            return None
        return int(found["whole"] or 0) + Fraction(top, bottom)
    if found := _REPEATING.fullmatch(text):
        period = found["bar"] or found["round"] or found["first"] + (found["inner"] or "") + (found["last"] or "")
        return _repeating(found["whole"], found["fixed"], period)
    if found := _GOES_ON.fullmatch(text):
        return _repeating(found["whole"], found["fixed"], found["digit"])
    return None


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    start = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
