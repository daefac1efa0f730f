"""References that the default grader cannot read are found before the first step, with file and row."""

import pytest

from megarl.rewards.math import can_read
from megarl.rewards.references import unreadable
from megarl.types import Prompt

GRADE = "megarl.rewards.math:grade"


def prompts(*answers: str) -> list[Prompt]:
    return [Prompt(str(i), (1,), "", answer, f"a.jsonl:{i}") for i, answer in enumerate(answers, start=1)]


def test_each_is_found_with_its_row():
    tables = [prompts("7", r"\frac{1}{", "x+1", "3 +"), prompts("(1,2)", "")]
    found = unreadable(GRADE, tables, workers=1, timeout=60.0, seconds=60.0)
    assert [where for where, _ in found.rows] == ["a.jsonl:2", "a.jsonl:4", "a.jsonl:2"]
    assert (found.checked, found.total) == (6, 6)
    assert str(found).startswith(
        "3 references cannot be read and get the verdict error: a.jsonl:2: ValueError: the grader"
    )
    assert str(found).endswith(", and 2 more")


def test_time_is_bounded_and_what_was_not_checked_is_said():
    found = unreadable(GRADE, [prompts("3 +", *["7"] * 99)], workers=1, timeout=60.0, seconds=0.0)
    assert (found.checked, found.total, found.rows) == (0, 100, [])


def test_another_grading_function_is_asked_nothing():
    assert unreadable("mine:grade", [prompts("3 +")], 1, 1.0, 60.0).rows == []


def test_can_read():
    assert can_read("", "7") and can_read("", r"\frac{1}{2}") and can_read("", "ABC")
    with pytest.raises(ValueError, match=r"cannot read the reference answer '3 \+'"):
        can_read("", "3 +")
