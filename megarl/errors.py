"""The errors that megarl raises on purpose: each is one line that a person can act on."""

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake in the settings, the data or the files given; `megarl` prints it on one line and exits with code 2."""


class RunError(Exception):
    """Something outside the user's hands failed (an engine, a worker, a deadline); exit code 1, the cause named."""


class Stopped(Exception):
    """A run that was asked to leave has saved and left before its end; exit code 75: start it again with --resume."""

    EXIT_CODE = 75  # "temporary failure, try again" in sysexits.h


class RanksLost(RunError):
    """Another rank has left: a consequence, whose cause that rank or whoever started it can tell."""


class DeadlineExceeded(RunError):
    """A wait outlived its deadline."""

    def __init__(self, waited_for: str, seconds: float) -> None:
        super().__init__(f"gave up after {seconds:g} s waiting for {waited_for}")


def printable(text: str) -> str:
    """`text` for a terminal: what a file, a template or another process wrote cannot move the cursor or set colours.

    Line ends stay. Every other control character, and what reorders or hides text, is written as `\\x1b`.
    """
    return "".join(c if c == "\n" or c.isprintable() else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """As `printable`, with line ends as spaces."""
    return printable(" ".join(text.split("\n")))


def _escaped(character: str) -> str:
    if character == "\t" or unicodedata.category(character) == "Zs":  # other spaces
        return " "
    return character.encode("unicode_escape").decode()


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the known word nearest to `word`, `" (did you mean 'lr'?)"`, or all of them when none is near."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(names)})"
