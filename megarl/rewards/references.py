"""Which reference answers the default grader cannot read: said when a run starts, not found by its rewards."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain, islice

from megarl.rewards.workers import Graders
from megarl.types import Prompt

READERS = "megarl.rewards."  # grading functions of this package read references as `CHECK` does
CHECK = "megarl.rewards.math:can_read"
_PLAIN = re.compile(r"-?[0-9]{1,100}")  # needs no reader
_AT_ONCE = 64


@dataclass(slots=True)
class Unreadable:
    """What a check of references found."""

    checked: int = 0
    total: int = 0
    rows: list[tuple[str, str]] = field(default_factory=list)  # (file and row, why)

    def __str__(self) -> str:
        where, why = self.rows[0]
        more = f", and {len(self.rows) - 1} more" if len(self.rows) > 1 else ""
        of = (
            f"{self.checked} of {self.total} references that were checked"
            if self.checked < self.total
            else "references"
        )
        return f"{len(self.rows)} {of} cannot be read and get the verdict error: {where}: {why}{more}"


def unreadable(
    function: str, tables: Sequence[Sequence[Prompt]], workers: int, timeout: float, seconds: float
) -> Unreadable:
    """Check the references of all prompts in grader processes, for at most about `seconds` plus one `timeout`.

    A function that is not of this package is asked nothing: only it knows what it can read.
    """
    found = Unreadable(total=sum(map(len, tables)))
    if not function.startswith(READERS):
        return found
    until = time.monotonic() + seconds
    prompts = chain.from_iterable(tables)
    with ExitStack() as stack:
        graders: Graders | None = None  # none is started for integers alone
        while (batch := list(islice(prompts, _AT_ONCE))) and time.monotonic() < until:
            found.checked += len(batch)
            unclear = [prompt for prompt in batch if not _PLAIN.fullmatch(prompt.answer)]
            if unclear and graders is None:
                graders = stack.enter_context(closing(Graders(CHECK, workers, timeout)))
            grades = [(prompt, graders.submit("", prompt.answer)) for prompt in unclear if graders]
            found.rows += [(p.source, g.message) for p, future in grades if (g := future.result()).verdict != "right"]
    return found
