"""Stops found token by token, against a search of the whole text."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.rollout.engine import Sampling
from megarl.rollout.stops import Match, Stops


def run(stops: Stops, ids: list[int], first: int = 0) -> tuple[int, Match | None]:
    """Feed ids as the engine does, checking only `stop_candidates` and what a pending word calls for.

    Returns (tokens fed, match)."""
    pending = first > 0 and stops.awaits(ids, 0, first)
    for end in range(first + 1, len(ids) + 1):
        if stops.stop_candidates[ids[end - 1]] or pending:
            match, pending = stops.check(np.array(ids), 0, end)
            if match:
                return end, match
    return len(ids), None


def make(vocabulary, **stops) -> Stops:
    return Stops(Sampling(max_tokens=1, **stops), vocabulary, len(vocabulary.pieces))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ok. Wait, no", True),
        ("Wait", False),  # the next character may be a letter
        ("Wait ", True),
        ("Waiting. ", False),
        ("await x", False),
        ("aWait x", False),
        ("\n\nWait\n", True),
        ("é Wait等", True),
        ("等Wait等", True),
        ("3Wait3", True),
        ("WAIT wait ", False),
        ("Waiting Wait.", True),
    ],
)
def test_stand_alone_words(byte_vocabulary, text, found):
    """Case-sensitive, not inside words; digits and letters beyond ASCII do not count as letters (as in the reward)."""
    ids = byte_vocabulary.encode(text)
    _, match = run(make(byte_vocabulary, stop_words=("Wait",)), ids)
    assert (match is not None) == found
    if match:
        before = byte_vocabulary.bytes_of(ids[: match.start]).decode(errors="ignore")
        assert len(before) <= re.search(r"(?<![A-Za-z])Wait(?![A-Za-z])", text).start()
        assert b"W" in byte_vocabulary.pieces[ids[match.start]]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_agrees_with_a_search_of_the_text(byte_vocabulary, data):
    """Random token sequences over awkward pieces (parts of words, halves of characters): the stop comes exactly with
    the first token after which a regular expression finds a bounded word or a text, and begins where that does."""
    pool = [
        "W",
        "a",
        "it",
        "Wa",
        "Wait",
        "ing",
        " ",
        " Wait",
        "\n\n",
        "\n\nWait",
        "é",
        "x",
        ".",
        "Waiting",
        " Wa",
        "No",
    ]
    singles = sorted({i for text in pool for i in byte_vocabulary.encode(text)})
    ids = data.draw(st.lists(st.sampled_from(singles), max_size=14))
    words, texts = data.draw(
        st.sampled_from([(("Wait",), ()), (("Wait", "No"), ()), (("No",), ("iti", "Wait")), ((), ("ait",))])
    )
    fed, match = run(make(byte_vocabulary, stop_words=words, stop_texts=texts), ids)

    patterns = [rb"(?<![A-Za-z])%s(?=[^A-Za-z])" % w.encode() for w in words] + [t.encode() for t in texts]
    expected = None
    for end in range(1, len(ids) + 1):
        text = byte_vocabulary.bytes_of(ids[:end])
        hits = [m.start() for p in patterns for m in re.finditer(b"(?=" + p + b")", text)]
        if hits:
            expected = (end, min(hits))
            break
    if expected is None:
        assert match is None
    else:
        assert match is not None and fed == expected[0]
        at = len(byte_vocabulary.bytes_of(ids[: match.start]))
        assert at <= expected[1] < at + len(byte_vocabulary.pieces[ids[match.start]])


def test_a_word_may_begin_in_what_was_given(byte_vocabulary):
    """A continuation sees the end of the response so far: a word begun there is completed, one finished there waits."""
    stops = make(byte_vocabulary, stop_words=("Wait",))
    ids = [*byte_vocabulary.encode("x Wa"), *byte_vocabulary.encode("it"), *byte_vocabulary.encode(".")]
    given = len(byte_vocabulary.encode("x Wa"))
    fed, match = run(stops, ids, first=given)
    assert fed == len(ids) and match.start == given - 1
    ids = [*byte_vocabulary.encode("x Wait"), *byte_vocabulary.encode(".")]
    fed, match = run(stops, ids, first=len(ids) - 1)
    assert fed == len(ids) and match.start < len(ids) - 1


def test_a_word_counts_once(byte_vocabulary):
    """What was confirmed before the continuation does not stop it again."""
    stops = make(byte_vocabulary, stop_words=("Wait",))
    ids = byte_vocabulary.encode("Wait, x. ")
    assert run(stops, ids, first=byte_vocabulary.encode("Wait,").__len__())[1] is None


def test_ids_then_sequences_then_texts(byte_vocabulary):
    """One token may complete several stops; the first kind is reported."""
    end = byte_vocabulary.tokenizer.eos_token_id
    wait = byte_vocabulary.encode("Wait")
    ids = [*wait, end]
    kinds = {"stop_token_ids": (end,), "stop_sequences": (tuple(ids),), "stop_words": ("Wait",)}
    assert run(make(byte_vocabulary, **kinds), ids)[1] == Match(end, len(ids) - 1)
    del kinds["stop_token_ids"]
    assert run(make(byte_vocabulary, **kinds), ids)[1] == Match(tuple(ids), 0)
    del kinds["stop_sequences"]
    assert run(make(byte_vocabulary, **kinds), ids)[1] == Match("Wait", 0)
