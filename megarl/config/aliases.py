"""What a setting of another trainer, or an old one of megarl, is called here: the table is aliases.yaml.

Nothing here sets anything. An unknown setting is refused, and the message gives the right name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml


@cache
def table() -> dict[str, str]:
    """Name elsewhere, one or more dotted components → the answer, in words that follow the name."""
    read = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    renamed = {name: f"is called {ours} here" for ours, names in read["names"].items() for name in names.split()}
    absent = {
        name: f"has no equivalent: {hint}" for hint, names in read["no_equivalent"].items() for name in names.split()
    }
    return renamed | absent


def answer(name: str) -> str | None:
    """What the dotted `name` is called here, in words that follow it. None if no tail of it is in the table."""
    parts = name.lower().replace("-", "_").split(".")
    tails = [".".join(parts[i:]) for i in range(len(parts))]  # the longest, and so the surest, comes first
    return next((table()[tail] for tail in tails if tail in table()), None)
