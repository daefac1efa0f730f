r"""How a row's reference answer is read: kept to the last sign, or refused.

The answer is the first of the columns `ANSWERS` that has one. `null`, NaN and their names ("nan", "None") are none.
Of a worked solution only the final answer is kept: each of its boxes (MATH), or the value after `####` (GSM8K).
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from typing import Any

from megarl.boxed import boxes
from megarl.errors import UserError

ANSWERS = ("answer", "ground_truth", "reward_model.ground_truth", "expected_answer", "final_answer", "solution")
WORKED = ("solution", "the assistant's message")  # may be a derivation rather than an answer
LONGEST_INTEGER = 4000  # digits: Python's limit for text is 4,300

_NONE = {"", "none", "null", "nan", "<na>", "nat"}
# 1,500 but neither (1,500) nor 1, 500: the digits of one number, outside brackets
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?!\d|,\d|[)\]}])")
_BARE_BOX = re.compile(r"\\boxed\s+([^$\n]+)")


class WrittenFloat(float):
    """A JSON number with a fraction or an exponent, and its text: a double has not all of its digits."""

    text: str


class LongInteger(str):
    """The digits of a JSON integer that is too long for Python to read."""


def parse_float(text: str) -> WrittenFloat:
    """For `json.loads`."""
    number = WrittenFloat(text)
    number.text = text
    return number


def parse_int(text: str) -> int | LongInteger:
    """For `json.loads`: a long integer is no error where nobody reads it."""
    return int(text) if len(text) <= LONGEST_INTEGER else LongInteger(text)


def reference(record: dict[str, Any], reply: str | None, where: str) -> tuple[str, str]:
    r"""A row's reference answer as the grader gets it; or "", and why there is none.

    Numbers are written as in the file. A list is several answers, "3, 5", as are several boxes of a solution. Objects
    become JSON.
    Raises UserError for a value that cannot be kept: an infinity, a list with a hole, bytes, an integer of more than
    `LONGEST_INTEGER` digits.
    """
    candidates = {name: _field(record, name) for name in ANSWERS} | {WORKED[1]: reply}
    column = next((name for name, value in candidates.items() if not _is_none(value)), None)
    if column is None:
        hollow = next((n for n, value in candidates.items() if value not in (None, "", [], {})), None)
        return "", f"{hollow} is {candidates[hollow]!r}" if hollow else f"none of {', '.join(ANSWERS)}"
    try:
        answer = _text(candidates[column], column)
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{where}: {column}: {e or 'nested too deeply'}") from None
    return answer or "", f"{column} has neither \\boxed{{…}} nor #### n"


def _field(record: dict[str, Any], name: str) -> Any:
    """`record[a][b]` for the name `a.b`; None where there is no such field."""
    value: Any = record
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _is_none(value: Any) -> bool:
    """Whether there is no answer: null, NaN, their names, and lists of them."""
    if isinstance(value, str):
        return value.strip().lower() in _NONE
    if isinstance(value, list | dict):
        return not value or (isinstance(value, list) and all(map(_is_none, value)))
    return value is None or (isinstance(value, float | decimal.Decimal) and math.isnan(value))


def _text(value: Any, column: str) -> str | None:
    """None for a worked solution of several lines that does not mark its answer."""
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0], column)
    if isinstance(value, str) and not isinstance(value, LongInteger):
        return _final(value, column)
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        if any(map(_is_none, value)):
            raise ValueError(f"has a hole: {value!r}")
        return ", ".join(item.strip() if type(item) is str else _scalar(item) for item in value)
    return _json(value) if isinstance(value, list | dict) else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, LongInteger) or (isinstance(value, int) and abs(value) >= 10**LONGEST_INTEGER):
        raise ValueError(f"an integer of more than {LONGEST_INTEGER} digits; write it as text")
    if isinstance(value, WrittenFloat):
        return value.text
    if isinstance(value, float | decimal.Decimal) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str | decimal.Decimal | datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    raise ValueError(f"a {type(value).__name__} is neither text, a number, a list nor an object")


def _json(value: Any) -> str:
    """JSON with sorted keys. Whatever would not come back as it is, is refused."""

    def check(part: Any) -> None:
        if isinstance(part, list | dict):
            for inner in part.values() if isinstance(part, dict) else part:
                check(inner)
        elif part is not None:
            text = _scalar(part)
            if isinstance(part, WrittenFloat) and decimal.Decimal(text) != decimal.Decimal(repr(float(part))):
                raise ValueError(f"{text} has more digits than a double")

    check(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _final(text: str, column: str) -> str | None:
    """The final answer of a text: its boxes, the value of its only `####` in the last line, or all of a short one."""
    if found := [content for _, _, content in boxes(text) if content]:
        return ", ".join(dict.fromkeys(found))
    if bare := _BARE_BOX.findall(text):
        return str(bare[-1]).strip()
    line = text.rstrip().rpartition("\n")[2]
    if text.count("####") == 1 and "####" in line:
        return _THOUSANDS.sub(lambda number: number[0].replace(",", ""), line.partition("####")[2].strip()) or None
    if column == WORKED[1]:
        return None
    return None if column in WORKED and "\n" in text.strip() else text.strip()
