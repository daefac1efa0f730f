"""The counting of english.py: that it finds what it is for, and nothing in what is not prose."""

from __future__ import annotations

import pytest

from tests.support.english import avoided, long, sentences

PAGE = """\
# A heading
One sentence here. Another one,
on two lines! See `a. b` and [a link](x.md).

- an item
- the next item. It ends

| setting | meaning |
|---|---|
| `a.b` | Seconds of waiting. 0 turns it off. |

```sh
this holds so many words
```

    indented code holds
"""


def test_sentences_of_every_kind_of_block() -> None:
    assert sentences(PAGE) == [
        "A heading", "One sentence here.", "Another one, on two lines!", "See `code` and a link.", "an item",
        "the next item.", "It ends", "setting", "meaning", "`code`", "Seconds of waiting.", "0 turns it off.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["The file holds it.", "A port of its own.", "After so many steps.", "It rose by 39 %.", "A rate of .7 is fine.",
     "First this; then that; then more.", "It is told once."],
)  # fmt: skip
def test_avoided_phrases_are_found(text: str) -> None:
    assert len(avoided(text)) == 1


def test_plain_english_passes() -> None:
    assert avoided(PAGE) == []
    assert avoided("It has 39% of 0.7, in v1.2 and §.. `so many`; a threshold, no household.") == []


def test_long_sentences_are_counted_in_words() -> None:
    assert long(" ".join(["word"] * 30) + ".") == []
    assert len(long(" ".join(["word"] * 31) + ".")) == 1
