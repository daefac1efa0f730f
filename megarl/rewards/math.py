r"""The default grader: the last `\boxed{…}` after the thought, compared as mathematics.

A response is right only if all of its answer was read and equals all of the reference. Both are brought to one form of
LaTeX (latex.py) and read into the same kinds (reading.py); single expressions are read by math-verify's parser
(expressions.py). It runs in a worker that is killed at its deadline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache

from megarl.boxed import final_boxes
from megarl.rewards.answers import numerals
from megarl.rewards.answers.expressions import Unreadable
from megarl.rewards.answers.kinds import Answer, Expression, Items
from megarl.rewards.answers.latex import Malformed, normalise
from megarl.rewards.answers.reading import read
from megarl.rewards.answers.same import same

_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")
_BLANK = re.compile(r"(?<!\d) +| +(?!\d)")
_LONGEST = 4000  # characters of an answer that is read; longer ones are compared as they are
_LETTER_UNIT = re.compile(r"(?<=\d) ([mgshLNJWV])$")
_GROUP = re.compile(r",(?=\d{3})")


def grade(response: str, answer: str) -> bool:
    r"""Whether the response's last `\boxed{…}` equals the reference answer. False when it has none.

    Boxes that only "and", "or" or commas part are several answers. Where the reference has several, so are all boxes.
    Raises ValueError when the reference answer cannot be read: then no response could be right.
    """
    last, every = final_boxes(response)
    answer = answer.strip()
    if len(last) == 1 and _plain_equal(last[0], answer):
        return True
    reference = _reference(answer)
    candidates = [last]
    if isinstance(reference, Items) and len(every) > len(last):
        candidates.append(every)
    return any(_is_right(", ".join(boxes), reference) for boxes in candidates if boxes)


def can_read(response: str, answer: str) -> bool:
    """Whether the reference answer can be read, whatever the response. Raises ValueError, saying why it cannot."""
    answer = answer.strip()
    return _INTEGER.fullmatch(answer) is not None or _reference(answer) is not None


def _plain_equal(given: str, answer: str) -> bool:
    """Whether two texts are the same to the last sign, or the same integer."""
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(answer):
        return int(given) == int(answer)
    return bool(answer) and (given == answer or _letters(given) == _letters(answer) != "")


def _letters(text: str) -> str:
    """The text in one form of LaTeX, without blanks. "" if it has none."""
    if len(text) > _LONGEST:
        return ""
    try:
        return _BLANK.sub("", normalise(text))
    except Malformed:
        return ""


@lru_cache(maxsize=4096)
def _reference(answer: str) -> Answer:
    if len(answer) > _LONGEST:
        raise ValueError(f"the grader cannot read a reference answer of {len(answer)} characters")
    if len(listed := _listed(answer)) > 1:
        return Items(tuple(_reference(item) for item in listed))
    try:
        return read(normalise(listed[0]))
    except (Malformed, Unreadable, RecursionError) as e:
        raise ValueError(
            f"the grader cannot read the reference answer {answer[:200]!r}: {e or 'nested too deeply'}"
        ) from None


def _listed(answer: str) -> list[str]:
    """The texts of a JSON list, as some data sets write their answers; any other text alone."""
    if answer.startswith('["') and answer.endswith('"]'):
        with suppress(ValueError):
            items = json.loads(answer)
            if all(isinstance(item, str) and item.strip() for item in items):
                return list(items)
    return [answer]


def _is_right(given: str, reference: Answer) -> bool:
    for text in _readings(given, reference):
        try:
            if same(read(text), reference):
                return True
        except (Unreadable, RecursionError):
            continue
    return False


def _readings(given: str, reference: Answer) -> Iterator[str]:
    """The normalised response. `100,200` is two answers where two are wanted, and `14 m` is 14 where a number is."""
    if len(given) > _LONGEST:
        return
    try:
        text = normalise(given)
    except (Malformed, RecursionError):
        return
    yield text
    if isinstance(reference, Items) and _GROUP.search(text):
        yield _GROUP.sub(", ", text)
    if isinstance(reference, Expression) and numerals.read(reference.text) is not None:
        yield _LETTER_UNIT.sub(r" \\text{\1}", text)
