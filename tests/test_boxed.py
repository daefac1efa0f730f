r"""`\boxed{…}`: the last complete one, with balanced braces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.boxed import answer_part, final_boxes, last_boxed, with_opening

plain = st.text("a1 $é", max_size=5)
balanced = st.recursive(
    plain | st.sampled_from([r"\{", r"\}", r"\frac", r"\\"]),
    lambda inner: st.builds("{{{}}}".format, inner) | st.builds("{}{}".format, inner, inner),
    max_leaves=8,
)


@given(st.text("a1 {}\\", max_size=20), balanced, plain)
def test_last_boxed(before, content, after):
    """Any balanced content comes back, whatever text stands around it, a box cut off at the end included."""
    text = f"{before}\\boxed{{{content}}}{after}"
    assert last_boxed(text) == content.strip()
    assert last_boxed(text + r" \boxed{\frac{1") == content.strip()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("", None),
        ("boxed{1}", None),
        (r"\boxed{1", None),
        (r"\boxed{1} then \boxed {2}", "2"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{4}", "4"),
    ],
)
def test_examples(text, content):
    assert last_boxed(text) == content


def test_answer_part():
    """Only what follows the thought counts; without a closed thought, everything does."""
    assert answer_part("a</think>b</think>c") == "c"
    assert answer_part("<think>a") == ""  # an open thought is no answer
    assert answer_part("a</think>b<think>c") == "b"
    assert answer_part("a <think>b") == "a "


def test_a_thought_that_the_prompt_opened():
    """The response then begins within it, and has no answer until it closes it."""
    for prompt in ("q <think>", "q\n<think>\n"):
        assert answer_part(with_opening(prompt, r"\boxed{1}")) == ""
        assert answer_part(with_opening(prompt, r"\boxed{1}</think>2")) == "2"
    for prompt in ("q", "q <think>\n\n</think>\n\n", "Think within <think> and </think>.", "<think> is a word"):
        assert with_opening(prompt, "a") == "a"


@pytest.mark.parametrize(
    ("text", "last", "every"),
    [
        (r"no box", [], []),
        (r"\boxed{1}", ["1"], ["1"]),
        (r"\boxed{1} and \boxed{2}", ["1", "2"], ["1", "2"]),
        (r"$x=\boxed{1}$, $y = \boxed{2}$", ["1", "2"], ["1", "2"]),
        (r"\boxed{1} so \boxed{2} or $\boxed{3}$", ["2", "3"], ["1", "2", "3"]),
        (r"\boxed{1}. \boxed{2}", ["2"], ["1", "2"]),
        (r"\boxed{5} \quad \text{or} \quad \boxed{5}", ["5"], ["5"]),
        (r"\boxed{a \boxed{b} c}", [r"a \boxed{b} c"], [r"a \boxed{b} c"]),
        (r"\boxed{\fbox{b}}", ["b"], ["b"]),
        (r"\boxed{\boxed{a} \boxed{b}}", [r"\boxed{a} \boxed{b}"], [r"\boxed{a} \boxed{b}"]),
        (r"\boxed{1} \boxed{2", ["1"], ["1"]),
        (r"\boxed{1}</think>\boxed{2}", ["2"], ["2"]),
        (r"\boxed{1}<think>\boxed{2}", ["1"], ["1"]),
    ],
)
def test_final_boxes(text, last, every):
    """Boxes that nothing but "and", "or", commas and `x =` parts are one answer."""
    assert final_boxes(text) == (last, every)
