r"""Answers in words and the letters of multiple choices."""

from __future__ import annotations

import re
from collections.abc import Callable

from megarl.rewards.answers.expressions import Unreadable
from megarl.rewards.answers.kinds import Answer, Choice, Expression, Word
from megarl.rewards.answers.vocabulary import NUMBER_WORDS

_ALIKE = {
    "yes": "true",
    "no": "false",
    "nosolution": "nosolutions norealsolution norealsolutions therearenosolutions therearenorealsolutions emptyset "
    "nosolutionexists nosolutionsexist theemptyset",
    "doesnotexist": "dne limitdoesnotexist thelimitdoesnotexist",
    "allrealnumbers": "allreals allreal therealnumbers realnumbers therealnumberline anyrealnumber",
}
_SYNONYMS = {other: word for word, others in _ALIKE.items() for other in others.split()}
_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|[^\W\d_]|[\d '.\-_]|(?<=[^\W\d_]),)+")
_CHOICE = re.compile(
    r"(?:(?:\\text\{ ?(?:choice|option) ?\}|choice|option) ?)?"
    r"(?:\( ?(?:\\text\{)?(?P<round>[A-H])\}? ?\)|(?:\\text\{)?(?P<marked>[A-H]) ?[).:]\}?"
    r"|(?:\\text\{ ?)?(?P<bare>[A-H])(?: ?\})?)"
    r"[.:]?(?P<rest>.*)",
    re.S | re.I,
)


def choice(text: str, read: Callable[[str], Answer]) -> Answer | None:
    found = _CHOICE.fullmatch(text)
    if found is None:
        return None
    letter = found["round"] or found["marked"] or found["bare"]
    rest = found["rest"].strip()
    if not rest:
        return Choice(letter.upper()) if letter.isupper() or (found["round"] is None and found["marked"]) else None
    if found["bare"] or not letter.isupper() or not re.match(r" |\\|\d", found["rest"]):
        return None
    if re.match(r"[-+*/^_<>=|,;)]|\\(?:text\{(?:and|or)|cup|cap|in\b|to|times|cdot|div|leq|geq|neq|land|lor)", rest):
        return None
    try:
        return Choice(letter, read(rest))
    except Unreadable:
        return Choice(letter, Word(letters_of(rest)))


def words(text: str) -> Answer | None:
    if not _WORDS.fullmatch(text) or not re.search(r"[^\W\d_]", text):
        return None
    bare = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    letters = re.sub(r"[^\w]|_", "", bare)
    words = bare.split()
    whole = r"\text" in text and not re.sub(r"\\text\{[^{}]*\}|\s", "", text)
    if not whole and not any(
        re.fullmatch(r"[^\W\d_]{3,}[.,']?|[A-Z][A-Za-z]|no|[^\W\d_a-zA-Z]+", word) for word in words
    ):
        return None
    if re.search(r"\d", bare) and not re.match(r"[^\W\d_]{2,}", bare):
        return None  # 14 apples is no word, July 4 is one
    if whole and len(letters) == 1 and letters.isascii():
        return Expression(letters)
    low = letters.casefold()
    if low in NUMBER_WORDS:
        return Expression(str(NUMBER_WORDS.index(low)))
    return Word(letters_of(bare), letters)


def letters_of(text: str) -> str:
    low = re.sub(r"\\text\b|[^\w\\]|_", "", text).casefold()
    return _SYNONYMS.get(low, low)
