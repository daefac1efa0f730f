r"""The default grader: the last `\boxed{…}` after the thought against the reference answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify

from megarl.rewards.math import grade

integers = st.integers().map(str) | st.from_regex(r"[+-]?[0-9]{1,30}", fullmatch=True)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"<think>hm</think> So \boxed{42}.", "42", True),
        (r"\boxed{41}", "42", False),
        ("42", "42", False),  # not boxed
        (r"<think>\boxed{42}</think> 42", "42", False),  # boxed in the thought only
        (r"\boxed{1} or \boxed{2}", "2", True),
        (r"\boxed{1} or \boxed{2}", "1", False),
        (r"\boxed{2} and then \boxed{3", "2", True),  # cut off
        (r"\boxed{\frac{2}{4}}", "0.5", True),
        (r"\boxed{\dfrac{1}{2}}", r"\frac12", True),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", True),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{\text{Evelyn}}", "Evelyn", True),
        (r"\boxed{Evelyn}", "Eve", False),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{007}", " 7 ", True),
        (r"\boxed{}", "0", False),
        (r"\boxed{\frac{}", "0", False),
        (r"\boxed{((((}", "0", False),
    ],
)
def test_examples(response, answer, right):
    assert grade(response, answer) is right


@settings(max_examples=60)
@given(integers, integers, st.booleans())
def test_integers_take_the_short_way_to_the_same_verdict(given_answer, answer, same):
    """Plain integers are compared without math-verify, and always as it would have done."""
    given_answer = answer if same else given_answer
    expected = verify(parse(f"\\boxed{{{answer}}}"), parse(f"\\boxed{{{given_answer}}}"))
    assert grade(f"\\boxed{{{given_answer}}}", answer) is expected


def test_an_unreadable_reference_is_an_error():
    """No response could be right then: it must not be counted as the policy's mistake."""
    with pytest.raises(ValueError, match="cannot read the reference answer"):
        grade(r"\boxed{1}", "")
