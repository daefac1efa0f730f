r"""`\boxed{…}`: the last complete one, with balanced braces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.boxed import answer_part, last_boxed

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
    assert answer_part("<think>a") == "<think>a"
