r"""`\boxed{…}`, the form in which problems and responses give their final answer. Light: grader workers import it."""

from __future__ import annotations

import re

# A box opens, a character that is no brace (\{, \}, \\), or a brace; "\\boxed" with its backslash doubled counts too.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[{}]|\\\\(?!boxed|fbox)|(?P<open>\{)|(?P<close>\})")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\fbox{…}`) whose braces balance; None when there is none. One pass."""
    opened: list[int | None] = []  # for each open brace, where the box's content starts, or None for a bare brace
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
    """What follows the last `</think>`; the whole response when it never closes a thought."""
    return response.rpartition("</think>")[2]
