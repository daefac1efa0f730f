"""The reward function, imported and called in its own process, as a run does."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from megarl.config import Settings
from megarl.data.prompts import first_answers
from megarl.errors import RunError, UserError
from megarl.rewards.workers import Graders

MADE_UP = "Let me guess.\n</think>\n\n\\boxed{0}"
"""A response to try the reward function on."""


def tried(settings: Settings, files: list[Path]) -> str:
    """Grade a made-up response to the first problems of `files`, as the controller does; what came of it, in words.

    Raises UserError if the function cannot be imported, takes other arguments, or gives no verdict at all.
    """
    function = settings.reward.function
    try:
        with closing(Graders(function, workers=1, timeout=settings.reward.timeout)) as graders:
            answers = _answers(settings, files)
            grades = [grade.result() for grade in [graders.submit(MADE_UP, answer) for answer in answers]]
    except RunError as e:
        raise UserError(f"reward.function: '{function}': {e}") from None
    if grades and all(grade.verdict in ("error", "timeout") for grade in grades):
        raise UserError(f"reward.function: '{function}' fails on a made-up response: {grades[0].message}")
    return f"{function}: {', '.join(grade.verdict for grade in grades) or 'imported'} for a made-up response"


def _answers(settings: Settings, files: list[Path]) -> list[str]:
    """Of the first problems; none if the data cannot be read, which the check of the data tells."""
    try:
        return first_answers(files, 3, settings.data)
    except UserError:
        return []
