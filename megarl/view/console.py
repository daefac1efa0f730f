"""The one way to a terminal: text is shown as it is. A path or a message is no markup and controls nothing."""

from __future__ import annotations

from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from megarl.errors import printable


def console(*, stderr: bool = False, file: TextIO | None = None, **options: Any) -> Console:
    """A rich console that reads no markup, emoji names or numbers out of text. Styles come as `rich.text.Text`."""
    return Console(stderr=stderr, file=file, markup=False, emoji=False, highlight=False, **options)


def plain(value: object, style: str = "") -> Text:
    """`value` as text, without control characters."""
    return Text(printable(str(value)), style=style)
