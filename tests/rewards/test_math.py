r"""The default grader: the last `\boxed{…}` after the thought against the reference answer.

Answers of every kind are in megarl/bench/grading.jsonl, with the verdict that a person gives; all are tried here. The
other tests draw their inputs: how a number is written must not matter, and what is added to an answer must.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.bench.grading import SHIPPED, whole
from megarl.rewards.grade import judge
from megarl.rewards.math import grade

CASES = [json.loads(line) for line in Path(SHIPPED).read_text().splitlines()]
KINDS = list(dict.fromkeys(case["kind"] for case in CASES))
integers = st.integers().map(str) | st.from_regex(r"[+-]?[0-9]{1,30}", fullmatch=True)
numbers = st.integers(1, 10**12)


def verdict(response: str, reference: str) -> str:
    return judge(grade, whole(response), reference).verdict


def misjudged(cases: list[dict[str, str]]) -> list[str]:
    return [
        f"{case['response']!r} for {case['reference']!r} is {case['verdict']}, not {found}"
        for case in cases
        if (found := verdict(case["response"], case["reference"])) != case["verdict"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_verdicts_of_a_kind(kind):
    """One triple in eight of the shipped set has the verdict that a person gives."""
    assert misjudged([case for case in CASES if case["kind"] == kind][::8]) == []


@pytest.mark.slow
def test_all_verdicts():
    assert misjudged(CASES) == []


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"<think>hm</think> So \boxed{42}.", "42", True),
        (r"\boxed{41}", "42", False),
        ("42", "42", False),  # not boxed
        (r"<think>\boxed{42}</think> 42", "42", False),  # boxed in the thought only
        (r"<think>\boxed{42}, but wait", "42", False),  # the thought was cut off
        (r"\boxed{1} or \boxed{2}", "2", False),  # two answers for one
        (r"\boxed{1} or \boxed{2}", "1, 2", True),
        (r"\boxed{1}. No, \boxed{2}", "2", True),
        (r"\boxed{1}. No, \boxed{2}", "1", False),
        (r"\boxed{2} and then \boxed{3", "2", True),  # cut off
        (r"\boxed{}", "0", False),
        (r"\boxed{\frac{}", "0", False),
        (r"\boxed{((((}", "0", False),
    ],
)
def test_boxes(response, answer, right):
    assert grade(response, answer) is right


@settings(max_examples=60)
@given(integers, integers, st.booleans())
def test_integers_are_compared_as_integers(given_answer, answer, same):
    given_answer = answer if same else given_answer
    assert grade(f"\\boxed{{{given_answer}}}", answer) is (int(given_answer) == int(answer))


def spellings(n: int) -> list[str]:
    """One integer as people and models write it."""
    grouped = f"{n:,}"
    marks = ["{,}", r"\,", r"\;", r"\ ", "~", " ", "\u2009", "\u202f", "\u00a0"]
    wide = "".join(chr(0xFF10 + int(d)) for d in str(n))
    arabic = "".join(chr(0x660 + int(d)) for d in str(n))
    return [
        *(grouped.replace(",", mark) for mark in marks), grouped, f"{n}.0", f"{n}.", f"x={n}",
        rf"\frac{{{2 * n}}}{{2}}",
        f"{2 * n}/2", rf"\text{{{n}}}", rf"{n}\text{{ cm}}", rf"\${grouped}", rf"{n}^\circ", wide, arabic, f"0{n}",
        rf"\left({n}\right)", rf"\mathbf{{{n}}}", rf"{n} \times 10^0", f"{n}e0", rf"{n - 1}+1", rf"\{{{n}\}}", f"+{n}",
        rf"\approx {n}",
    ]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(numbers)
def test_the_writing_of_a_number_does_not_matter(n):
    """Neither in the response nor in the reference."""
    written = spellings(n)
    assert [text for text in written if verdict(text, str(n)) != "right"] == []
    assert [text for text in written if verdict(str(n), text) != "right"] == []
    assert [text for text in written if verdict(text, str(n + 1)) != "wrong"] == []


ADDED = [
    "{} x", "{}, 1", "{} or 1", "{} and 1", "> {}", r"\geq {}", r"\neq {}", r"1 \to {}", r"{} \ldots", r"\pm {}", "{}!",
    r"{}\text{{ or more}}", r"\text{{not }} {}", "{} = 1", r"{}\pi", "({}, 1)", r"{}\sqrt{{2}}", "{}_7", "{}:1", "-{}",
    r"\sqrt{{{}}}", "{}^2", "{}\\text{{ thousand}}", "[{}, 1]", r"\frac{{{}}}{{3}}", "{}?", "2x = {}", "{} 1/2",
    r"{} \pmod{{9}}", r"{}\cdot y", r"\{{{}, 1\}}", "{}.5", "{}0", "1{}", r"\overline{{{}}}", r"{}\text{{ and a half}}",
]  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 10**6))
def test_an_answer_with_something_added_is_another(n):
    """What is read in part is never right: the number is there each time, and is not all that is."""
    assert [added for added in ADDED if verdict(added.format(n), str(n)) == "right"] == []


@settings(max_examples=25, deadline=None)
@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
def test_fractions_are_exact(a, b):
    """However small the difference: as fractions, mixed numbers, and times a power of ten."""

    def written(value: Fraction) -> list[str]:
        sign, value = "-" * (value < 0), abs(value)
        whole_part, rest = divmod(value.numerator, value.denominator)
        mixed = [rf"{sign}{whole_part}\frac{{{rest}}}{{{value.denominator}}}"] if whole_part and rest else []
        return [rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}", f"{sign}{value}", *mixed]

    for text in written(a):
        assert verdict(text, str(a)) == "right"
        assert (verdict(text, str(b)) == "right") is (a == b)
        tiny, other = (rf"({x}) \times 10^{{-30}}" for x in (text, written(b)[0]))
        assert (verdict(tiny, other) == "right") is (a == b)


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=r"0123456789+-*/^_(){}[]\frac sqrtxyboxed,.=<>|&!%$\"'" + "√½∞°", max_size=30))
def test_any_text_gets_a_verdict(text):
    """Whatever a model writes is right or wrong; it is the reference that may be an error."""
    assert verdict(f"\\boxed{{{text}}}", "17") in ("right", "wrong")
    assert verdict("\\boxed{17}", text) in ("right", "wrong", "error")


@pytest.mark.parametrize(
    "reference", ["", "3 +", r"\frac{1}{", r"\int f(x) dx", "1,,2", '{"target": 7}', "7" * 5000 + "x"]
)
def test_an_unreadable_reference_is_an_error(reference):
    """No response could be right then: it must not be counted as the policy's mistake."""
    with pytest.raises(ValueError, match="cannot read (the|a) reference answer"):
        grade(r"\boxed{1}", reference)
    with pytest.raises(ValueError, match="cannot read (the|a) reference answer"):
        grade("no box", reference)


def test_what_cannot_be_read_is_right_when_it_is_the_same():
    text = r"\begin{cases} x & x>0 \\ 0 & x \leq 0 \end{cases}"
    assert grade(f"\\boxed{{{text}}}", text.replace(" ", ""))


@pytest.mark.parametrize(
    "response",
    [
        r"\frac{5^{5^{5^{5^5}}} - 5}{16}", r"10^{10^{10}}", r"(10^{7})!", "(" * 3000 + "1" + ")" * 3000, "9" * 100_000,
        "{" * 50_000 + "1" + "}" * 50_000, r"\sqrt{" * 900 + "2" + "}" * 900, "1," * 1900 + "1", "-" * 3000 + "1",
        "a" * 3900, r"\text{a }" * 400, "12 " * 1000, r"x^{x^{x^{x^{x^{x^{x}}}}}}", "1/" * 1500 + "1",
    ],
)  # fmt: skip
def test_monsters_are_judged_in_seconds(response):
    """Towers of powers, thousands of brackets and long texts neither hang nor fill the memory."""
    assert verdict(f"\\boxed{{{response}}}", "42") == "wrong"
