"""What can be known before a run starts: settings against model, machine, data, reward and folder. Nothing is written.

Each check raises UserError. `Mistakes` collects those of several, so that one attempt shows all of them.
"""

from __future__ import annotations

from types import TracebackType

from megarl.errors import UserError


class Mistakes:
    """`with mistakes:` keeps the body's UserError; `answer` raises all that were kept, a line each."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}  # in their order, each once

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, UserError):
            return False
        self._lines |= dict.fromkeys(str(error).splitlines())
        return True

    def answer(self) -> None:
        if self._lines:
            raise UserError("\n".join(self._lines))
