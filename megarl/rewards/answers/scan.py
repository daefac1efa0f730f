r"""Places in a normalised text: its tokens, and where it falls apart outside all brackets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from megarl.rewards.answers.expressions import Unreadable

_TOKEN = re.compile(r"\\begin\{\w+\}|\\end\{\w+\}|\\text\{[^{}]*\}|\\[a-zA-Z]+|\\.|.", re.S)
_OPENING = {"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"}


def _step(token: str) -> int:
    """1 for a token that opens a bracket, -1 for one that closes it, else 0."""
    opens = token in _OPENING or token.startswith(r"\begin")
    return opens - (token in _CLOSING or token.startswith(r"\end"))


def tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _top(text: str) -> Iterator[tuple[str, int, int]]:
    """The tokens outside all brackets, with their starts and ends. Raises Unreadable for one without its partner."""
    depth = 0
    for found in _TOKEN.finditer(text):
        step = _step(found[0])
        if not depth and not step:
            yield found[0], found.start(), found.end()
        depth += step
        if depth < 0:
            break
    if depth:
        raise Unreadable("a bracket without its partner")


def outside(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` applied to the stretches outside all brackets."""
    out: list[str] = []
    last = depth = 0
    for found in _TOKEN.finditer(text):
        step = _step(found[0])
        if step > 0 and not depth:
            out.append(change(text[last : found.start()]))
            last = found.start()
        depth += step
        if step < 0 and not depth:
            out.append(text[last : found.end()])
            last = found.end()
    return "".join([*out, text[last:] if depth else change(text[last:])])


def closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` is closed; -1 if it is not."""
    depth = 0
    for found in _TOKEN.finditer(text, start):
        depth += _step(found[0])
        if not depth:
            return found.end() - 1
    return -1


def split(text: str, marks: set[str]) -> tuple[list[str], list[str]]:
    """The texts between top-level marks, and the marks."""
    parts, found, last = [], [], 0
    for token, start, end in _top(text):
        if token in marks:
            parts.append(text[last:start].strip())
            found.append(token)
            last = end
    return [*parts, text[last:].strip()], found
