r"""The unit at the end of an answer, in one spelling: `14 \text{ square centimetres}` and `14 cm^2` have the same."""

from __future__ import annotations

import re

from megarl.rewards.answers.vocabulary import NO_UNIT

_SPELLINGS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre mtr",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "mg": "milligram",
    "g": "gram gm gramme", "kg": "kilogram kilo kilogramme", "t": "ton tonne", "lb": "pound lbs", "oz": "ounce",
    "ml": "milliliter millilitre", "l": "liter litre", "s": "second sec", "min": "minute", "h": "hour hr hrs",
    "day": "", "week": "", "month": "", "year": "yr", "$": "dollar usd", "cent": "¢", "€": "euro eur", "£": "gbp",
    "¥": "yen yuan jpy cny", "₹": "rupee inr rs", "degree": "deg", "%": "percent percentage pct",
    "unit": "",    "v": "volt", "a": "ampere amp", "w": "watt", "kw": "kilowatt", "j": "joule", "kj": "kilojoule",
    "n": "newton", "pa": "pascal",
    "hz": "hertz", "k": "kelvin", "mol": "mole", "acre": "", "radian": "rad", "person": "people", "child": "children",
    "man": "men", "woman": "women", "ω": "ohm", "pm": "", "am": "", "gal": "gallon", "mph": "", "kmh": "kmph kph",
}  # fmt: skip
_SPELLING = {word: unit for unit, words in _SPELLINGS.items() for word in (unit, *words.split())}
_WHOLE = {"mi/h": "mph", "km/h": "kmh", "degree c": "degree c", "degree celsius": "degree c",
          "degree fahrenheit": "degree f", "% point": "%"}  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}

_CURRENCY = re.compile(
    r"(?P<sign>[+-]?) ?(?:\\\$|\$|€|£|¥|₹|\\text\{ ?(?:\\?\$|USD|Rs\.?) ?\}|(?:USD|US\\?\$|Rs\.?)(?= ?\d)) ?"
)
_SIGNS = {"$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "R": "₹", "U": "$"}
_EXPONENT = r"(?: ?\^\{-?\d\})?"
_KNOWN = [f"{w}s?" for w in _SPELLING if len(w) > 1 and w.isalpha()] + [
    "mL",
    "Hz",
    "kW",
    "kJ",
    "Pa",
    "USD",
    "EUR",
    "Rs",
]
_KNOWN += [*SCALES, "squared", "cubed", "sq", "per", "square", "cubic"]
_SHORT = rf"[ap]\.m\.?|[AP]M|[AP]\.M\.?|{'|'.join(_KNOWN)}"
# 14 apples, but neither 3xyz nor 3 abc, which are products
_WORD = rf"(?<![a-zA-Z\\])(?:(?<=[ /])[a-zA-Z]{{4,}}\.?|{_SHORT})(?![a-zA-Z])"
_PART = rf"(?:\\text\{{[^{{}}]*\}}|%|¢|€|\\\$|\^\{{\\circ\}}|{_WORD}){_EXPONENT}"
_AFTER_SLASH = rf"(?:{_PART}|[a-zA-Z]{_EXPONENT})"
_FURTHER = rf"(?: ?(?:/ ?{_AFTER_SLASH}|(?:\\cdot )?{_PART}|(?<= )[a-zA-Z]{{3,}}|(?<=\}})[CFK]\b))"
_UNIT = re.compile(rf"(?P<value>.*?[^\s+\-*/=<>^_({{,\\]) ?(?P<unit>{_PART}{_FURTHER}*)", re.S)
_WORDS = re.compile(r"[^\W\d_]+|[$%€£¥₹¢]|/|\^|\d+|-")


def split(text: str) -> tuple[str, str]:
    """(what is counted, the unit in its one spelling), or (text, "") without unit. Scales count: `5 million`."""
    if found := _CURRENCY.match(text):
        sign = re.search(r"[$€£¥₹]|R|U", found[0])
        value, unit = split(found["sign"] + text[found.end() :])
        if sign is not None and unit in ("", _SIGNS[sign[0]], "cent") and value:
            return value, _SIGNS[sign[0]]
    found_unit = _UNIT.fullmatch(text)
    if found_unit is None:
        return text, ""
    value, unit = found_unit["value"].strip(), _spelled(found_unit["unit"])
    if not unit or not re.search(r"[\d)}\]]$|\\pi$|(?<![a-zA-Z])[a-z]$", value) or r"\text" in value:
        return text, ""
    first, _, rest = unit.partition(" ")
    if first in SCALES:
        return rf"({value}) \cdot {SCALES[first]}", rest
    return value, unit


def _spelled(text: str) -> str:
    """One spelling for a unit. "" if one of its words cannot be part of one."""
    text = text.replace(r"^{\circ}", " degree ").replace(r"\text", " ").replace(r"\$", "$").replace(r"\cdot", " ")
    text = re.sub(r"([ap])\.? ?m\b\.?", r"\1m ", text.lower().replace("per ", "/ ").replace("º", " degree "))
    words = _WORDS.findall(text)
    out: list[str] = []
    power = ""
    for i, word in enumerate(words):
        if word in NO_UNIT:
            return ""
        if word in ("square", "sq", "cubic", "cu") and i + 1 < len(words):
            power = "^2" if word.startswith("sq") else "^3"
        elif word in ("squared", "cubed"):
            out.append("^2" if word == "squared" else "^3")
        elif word not in ("/", "^", "-", "{", "}"):
            out.append((word if word.isdigit() or word in SCALES else _singular(word)) + power)
            power = ""
        else:
            out.append(word)
    joined = " ".join(out).replace(" ^ ", "^").replace(" ^2", "^2").replace(" ^3", "^3").replace(" / ", "/")
    joined = joined.replace("^- ", "^-")
    return _WHOLE.get(joined, joined) if len(out) <= 8 else ""


def _singular(word: str) -> str:
    for form in (word, word.removesuffix("s"), word.removesuffix("es")):
        if form in _SPELLING:
            return _SPELLING[form]
    return word.removesuffix("s") if len(word) > 3 else word
