"""The grades of one rollout: each is asked for when its completion is done, while others are still rolled out."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, InvalidStateError, wait
from contextlib import suppress
from typing import Any

from megarl.boxed import with_opening
from megarl.errors import DeadlineExceeded, RunError
from megarl.rewards.grade import Grade
from megarl.rewards.workers import Graders
from megarl.types import Completion, Group, Prompt


class Grading:
    """Sends completions to the graders and gathers their grades. Only the controller has graders."""

    def __init__(self, graders: Graders) -> None:
        self._graders = graders
        self._grades: dict[tuple[str, int], Future[Grade]] = {}
        self.broken: Future[Any] = Future()  # gets the error of the first grader that cannot go on, never a result

    def submit(self, prompt: Prompt, completion: Completion) -> None:
        """Send one completion to the graders, unless it was sent before. Returns at once."""
        key = prompt.uid, completion.index
        if key not in self._grades:
            response = with_opening(prompt.text, completion.text)
            self._grades[key] = self._graders.submit(response, prompt.answer)
            self._grades[key].add_done_callback(self._check)

    def wait(self, groups: Sequence[Group], seconds: float) -> list[list[Grade]]:
        """The grades of `groups`, whose completions were all submitted: one list per group, in its order.

        Raises RunError when every grade failed, and DeadlineExceeded after `seconds`.
        """
        done, missing = wait(self._grades.values(), seconds, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if missing:
            raise DeadlineExceeded(f"{len(missing)} of {len(self._grades)} grades", seconds)
        grades = [[self._grades[g.prompt.uid, c.index].result() for c in g.completions] for g in groups]
        flat = [grade for row in grades for grade in row]
        if flat and all(grade.verdict == "error" for grade in flat):
            raise RunError(
                f"reward.function: every one of {len(flat)} grades failed, the first with: {flat[0].message}"
            )
        return grades

    def _check(self, future: Future[Grade]) -> None:
        if error := future.exception():
            with suppress(InvalidStateError):  # not the first, or nobody waits any more
                self.broken.set_exception(error)
