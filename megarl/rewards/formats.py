r"""Graders for data whose prompts ask for another mark than `\boxed{…}`. The marked value is compared as math.py does.

| `reward.function` | the answer is what follows | data |
|---|---|---|
| `megarl.rewards.formats:answer_line` | the last line that begins with "Answer:" | DAPO-Math-17k and its AIME-2024 |
| `megarl.rewards.formats:gsm8k` | the last `####` | GSM8K |

A response without the mark is wrong, whatever else it says. The recipes `dapo_math` and `gsm8k` name these.
"""

from __future__ import annotations

import re

from megarl.boxed import answer_part, last_boxed
from megarl.rewards import math

# "Answer: 7", "**Final answer:** 7", "The answer: 7"; the value may stand on the next line.
_ANSWER = re.compile(r"^[ \t>#*_]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_]*:[*_]*\s*(\S[^\n]*)", re.I | re.M)
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_QUOTES = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"))


def answer_line(response: str, answer: str) -> bool:
    """Whether the value after the last "Answer:" equals the reference answer."""
    return _grade(_ANSWER.findall(answer_part(response)), answer)


def gsm8k(response: str, answer: str) -> bool:
    """Whether the value after the last `####` equals the reference answer. It may be written $1,000."""
    values = _HASHES.findall(answer_part(response))
    return _grade([_THOUSANDS.sub("", value).removeprefix("$") for value in values], answer)


def _grade(values: list[str], answer: str) -> bool:
    value = _bare(values[-1]) if values else ""
    boxed = f"\\boxed{{{value}}}"
    # Braces that do not balance would close the box early, and only a part would be compared.
    return bool(value) and last_boxed(boxed) == value and bool(math.grade(boxed, answer))


def _bare(text: str) -> str:
    r"""A value without what is often written around it: a final full stop, `$…$`, `**…**`, `\boxed{…}`."""
    before = None
    while text != before:
        before, text = text, text.strip().removesuffix(".").removesuffix("**").removeprefix("**")
        for left, right in _QUOTES:
            if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
                text = text[len(left) : -len(right)]
        boxed = last_boxed(text)
        if boxed is not None and re.fullmatch(r"\\(?:boxed|fbox)\s*\{.*\}", text, re.S) and text.count("boxed") <= 1:
            text = boxed
    return text
