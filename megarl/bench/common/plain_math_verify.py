"""math-verify alone, called as its README does: what the default grader is compared with."""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its timers are off


def grade(response: str, answer: str) -> bool:
    gold = parse(f"${answer.strip().strip('$')}$", parsing_timeout=None)
    return bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))
