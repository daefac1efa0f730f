"""Counts what makes English hard to read in a Markdown page: long sentences and phrases that the house avoids."""

from __future__ import annotations

import re

AVOIDED = {
    "holds": r"\bholds?\b",
    "of its own": r"\bof (?:its|their) own\b",
    "so many": r"\bso many\b",
    "is told": r"\b(?:is|are) told\b",
    "to be had": r"\bto be had\b",
    "asked of": r"\basked of\b",
    "a chain of semicolons": r";[^.!?;]*;",
    "39 %, not 39%": r"\d[  ]%",
    ".7, not 0.7": r"(?<![\w.\]])\.\d",
}
_BREAK = re.compile(r"^(?:#+ |[-*] |\d+\. |\||\s*$)")


def sentences(markdown: str) -> list[str]:
    """The sentences of a page, in order. Code blocks are left out, and a code span is the word `code`.

    A heading, a list item, a cell of a table and a paragraph each end their last sentence.
    """
    blocks: list[str] = []
    for line in _prose(markdown).splitlines():
        if line.startswith("|"):
            cells = line.replace("\\|", " ").strip("|").split("|")
            blocks += ["" if set(cell) <= set(" -:") else cell for cell in cells]
        elif _BREAK.match(line) or not blocks:
            blocks += [line.lstrip("#-* "), *([""] if line.startswith("#") else [])]
        else:
            blocks[-1] += f" {line}"
    found = [part for block in blocks for part in re.split(r"(?<=[.!?])[)\"'*]*\s+(?=[A-Z`*\"'(\[0-9])", block)]
    return [" ".join(each.split()) for each in found if re.search(r"\w", each)]


def long(markdown: str, most: int = 30) -> list[str]:
    """The sentences of more than `most` words."""
    return [each for each in sentences(markdown) if len(re.findall(r"[\w'’%.,-]*\w[\w'’%.,-]*", each)) > most]


def avoided(markdown: str) -> list[str]:
    """Every avoided phrase with the sentence that has it: `holds: The file holds two rows.`"""
    return [
        f"{name}: {each}"
        for each in sentences(markdown)
        for name, pattern in AVOIDED.items()
        if re.search(pattern, each, re.IGNORECASE)
    ]


def _prose(markdown: str) -> str:
    """Without code blocks, comments, HTML tags and link targets, each code span and picture made one word."""
    text = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(`+)[^`]+?\1", "`code`", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|</?[a-z][^>]*>", "", text)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
