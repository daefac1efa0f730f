r"""`\boxed{…}`, the form in which problems and responses give their final answer. Light: grader workers import it."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace, \{ or \}, is a character like any other


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` (or `\fbox{…}`) whose braces balance; None when there is none."""
    for box in reversed(list(_BOX.finditer(text))):
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[box.end() : brace.start()].strip()
    return None


def answer_part(response: str) -> str:
    """What follows the last `</think>`; the whole response when it never closes a thought."""
    return response.rpartition("</think>")[2]
