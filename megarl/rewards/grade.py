"""One verdict on one response, and the grading functions that give it."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megarl.boxed import answer_part, last_boxed
from megarl.errors import UserError, nearest

if TYPE_CHECKING:
    from megarl.types import Verdict

VERDICTS = ("right", "wrong", "timeout", "error")

GradingFunction = Callable[[str, str], Any]
"""`function(response, answer)` returns a bool, a number (right from 0.5 on), or a verdict."""


@dataclass(frozen=True, slots=True)
class Grade:
    verdict: Verdict
    score: float  # 1 or 0, or the number that the grading function gave; 0 after a timeout or an error
    formatted: bool  # the part after </think> has a \boxed{…}
    message: str = ""  # what went wrong, for `error`


def judge(function: GradingFunction, response: str, answer: str) -> Grade:
    """Call the grading function. Whatever it raises, or a value of another kind, gets the verdict `error`."""
    try:
        return _graded(function(response, answer), response)
    except BaseException as e:  # nothing that a function raises is ours: neither SystemExit nor CancelledError
        return failed("error", response, f"{type(e).__name__}: {e}")


def _graded(value: Any, response: str) -> Grade:
    if isinstance(value, str):
        if value in VERDICTS:
            return Grade(value, float(value == "right"), is_formatted(response))  # type: ignore[arg-type]
        return failed("error", response, f"the grading function returned {value!r}, not {', '.join(VERDICTS)}")
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if inspect.iscoroutine(value):
        value.close()
    if not math.isfinite(score):
        return failed("error", response, f"the grading function returned {value!r}, not a bool, number or verdict")
    return Grade("right" if score >= 0.5 else "wrong", score, is_formatted(response))


def failed(verdict: Verdict, response: str, message: str) -> Grade:
    """The grade of a response that could not be judged."""
    return Grade(verdict, 0.0, is_formatted(response), message)


def is_formatted(response: str) -> bool:
    r"""Whether the response's answer part has a complete `\boxed{…}`."""
    return last_boxed(answer_part(response)) is not None


def find(path: str) -> GradingFunction:
    """The grading function at the import path `package.module:function`.

    Raises UserError if it cannot be imported or does not take `(response, answer)`.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise UserError(f"reward.function: '{path}' is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as e:
        raise UserError(f"reward.function: '{path}': cannot import {module_name}: {type(e).__name__}: {e}") from None
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(f"reward.function: '{path}': {module_name} has no function '{name}'{nearest(name, known)}")
    with suppress(ValueError):  # some builtins have no signature
        try:
            inspect.signature(function).bind("response", "answer")
        except TypeError as e:
            raise UserError(f"reward.function: '{path}' must take (response, answer): {e}") from None
    return function
