r"""Finds `\boxed{…}`, which marks the final answer of problems and responses. Grader workers import only this file."""

from __future__ import annotations

import re

# The start of a box, an escaped character (\{, \}, \\), or a brace. "\\boxed", with a doubled backslash, counts too.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[{}]|\\\\(?!boxed|fbox)|(?P<open>\{)|(?P<close>\})")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` or `\fbox{…}` whose braces balance. None if there is none. One pass."""
    opened: list[int | None] = []  # for each open brace: where its box's content starts, or None if it is no box
    last: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, token.start()
    return None if last is None else text[slice(*last)].strip()


def answer_part(response: str) -> str:
    """The text after the last `</think>`, or the whole response if there is none."""
    return response.rpartition("</think>")[2]
