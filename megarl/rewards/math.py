r"""The default grader: the last `\boxed{…}` after the thought, compared by math-verify.

math-verify takes 2–400 ms a call and sometimes hangs. It runs in a worker that is killed at its deadline, so its own
timers (which use SIGALRM) are off.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

from megarl.boxed import answer_part, last_boxed

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timers are off

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


def grade(response: str, answer: str) -> bool:
    r"""Whether the response's last `\boxed{…}` equals the reference answer. False when it has none.

    Raises ValueError when math-verify cannot read the reference answer: then no response could be right.
    """
    given = last_boxed(answer_part(response))
    if given is None:
        return False
    answer = answer.strip()
    if given == answer:
        return True
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(answer):
        return int(given) == int(answer)
    return bool(verify(_reference(answer), _parse(given), timeout_seconds=None))


@lru_cache(maxsize=4096)
def _reference(answer: str) -> list[Any]:
    expressions = _parse(answer)
    if not expressions:
        raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
    return expressions


def _parse(text: str) -> list[Any]:
    return list(parse(f"\\boxed{{{text}}}", parsing_timeout=None))


_parse(r"\frac{1}{2}")  # the first call builds the grammar in 0.4 s: do it before any deadline runs
