r"""Finds `\boxed{…}`, which marks the final answer of problems and responses. Grader workers import only this file."""

from __future__ import annotations

import re

THINK, END_THINK = "<think>", "</think>"

# The start of a box, an escaped character (\{, \}, \\), or a brace. "\\boxed", with a doubled backslash, counts too.
_TOKEN = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\[{}]|\\\\(?!boxed|fbox)|(?P<open>\{)|(?P<close>\})")
# What may stand between two boxes that are one answer: "$\boxed{2}$ and $x = \boxed{3}$".
_BETWEEN = re.compile(
    r"(?:\s|[$,;&~]|\\[()\[\],; ]|\\q?quad\b|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])"
    r"|\\text\s*\{\s*,?\s*(?:and|or)?\s*,?\s*\}"
    r"|(?<![a-zA-Z])[a-zA-Z](?:_\{?\w\}?)?\s*=)*"
)
_NESTED = re.compile(r"\\(?:boxed|fbox)\s*\{(.*)\}", re.S)


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Where each `\boxed{…}` or `\fbox{…}` with balanced braces starts and ends, and its content. One pass.

    A box in a box is part of the outer one, and its content alone if it is all that the outer one has.
    """
    opened: list[
        tuple[int, int] | None
    ] = []  # for each open brace: its box's start and content, or None if it is no box
    closed: list[tuple[int, int, int]] = []
    for token in _TOKEN.finditer(text):
        if token["box"]:
            opened.append((token.start(), token.end()))
        elif token["open"]:
            opened.append(None)
        elif token["close"] and opened and (box := opened.pop()) is not None:
            while closed and closed[-1][0] > box[0]:
                closed.pop()
            closed.append((*box, token.start()))
    return [(start, end + 1, _inner(text[content:end])) for start, content, end in closed]


def _inner(content: str) -> str:
    content = content.strip()
    while found := _NESTED.fullmatch(content):
        if last_boxed(content[:-1]) is not None:  # two boxes side by side
            break
        content = found[1].strip()
    return content


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` or `\fbox{…}` whose braces balance. None if there is none."""
    found = boxes(text)
    return found[-1][2] if found else None


def final_boxes(response: str) -> tuple[list[str], list[str]]:
    r"""The contents of the last boxes of a response's answer part that belong together, and of all its boxes.

    Boxes belong together if nothing parts them but signs, "and", "or" and `x =`. Equal ones count once.
    """
    text = answer_part(response)
    found = boxes(text)
    first = len(found) - 1
    while first > 0 and _BETWEEN.fullmatch(text[found[first - 1][1] : found[first][0]]):
        first -= 1
    contents = [content for _, _, content in found]
    return list(dict.fromkeys(contents[max(first, 0) :])), list(dict.fromkeys(contents))


def answer_part(response: str) -> str:
    """The text after the last `</think>`, or the whole response if there is none; an open `<think>` ends it."""
    return response.rpartition(END_THINK)[2].partition(THINK)[0]


def with_opening(prompt: str, response: str) -> str:
    """The response, after the `<think>` that its prompt ends with: then it begins within a thought."""
    return THINK + response if prompt.rstrip().endswith(THINK) else response
