"""The grades of one rollout: begun one by one, gathered in the groups' order. The graders' processes are played."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from megarl.errors import DeadlineExceeded, RunError
from megarl.rewards.grade import Grade
from megarl.rewards.grading import Grading
from megarl.types import Completion, Group, Prompt


class PlayedGraders:
    """Notes what is submitted; the test gives the grades."""

    def __init__(self) -> None:
        self.futures: dict[tuple[str, str], Future[Grade]] = {}

    def submit(self, response: str, answer: str) -> Future[Grade]:
        assert (response, answer) not in self.futures, "graded twice"
        self.futures[response, answer] = Future()
        return self.futures[response, answer]


def group(uid: str, size: int) -> Group:
    empty = np.zeros(0)
    made = [Completion(uid, i, empty, empty, empty, "stop", text=f"{uid}{i}") for i in range(size)]
    return Group(Prompt(uid, (1,), "", f"answer {uid}", ""), made)


def begun(groups: list[Group], backwards: bool = False) -> tuple[Grading, PlayedGraders]:
    """Every completion submitted twice, as when it is done and when it is gathered."""
    graders = PlayedGraders()
    grading = Grading(graders)  # type: ignore[arg-type]
    pairs = [(g.prompt, c) for g in groups for c in g.completions]
    for prompt, completion in (pairs[::-1] if backwards else pairs) * 2:
        grading.submit(prompt, completion)
    return grading, graders


@pytest.mark.parametrize("backwards", [False, True])
def test_grades_come_in_the_groups_order(backwards: bool) -> None:
    """Whatever the order in which completions are done; each is graded once, against its own prompt's answer."""
    groups = [group("a", 2), group("b", 3)]
    grading, graders = begun(groups, backwards)
    assert set(graders.futures) == {("a0", "answer a"), ("a1", "answer a")} | {(f"b{i}", "answer b") for i in range(3)}
    for i, future in enumerate(graders.futures.values()):
        future.set_result(Grade("right", float(i), True))
    scores = [[grade.score for grade in row] for row in grading.wait(groups, 1.0)]
    assert scores == ([[4.0, 3.0], [2.0, 1.0, 0.0]] if backwards else [[0.0, 1.0], [2.0, 3.0, 4.0]])
    assert not grading.broken.done()


def test_a_thought_that_the_prompt_opened_is_opened_for_the_grader() -> None:
    """Else a response that was cut off in its thought would be graded by what it thought."""
    graders = PlayedGraders()
    grading = Grading(graders)  # type: ignore[arg-type]
    (completion,) = group("a", 1).completions
    grading.submit(Prompt("a", (1,), "2 + 3 = ? <think>\n", "5", ""), completion)
    assert list(graders.futures) == [("<think>a0", "5")]


def test_missing_grades_have_a_deadline() -> None:
    grading, graders = begun([group("a", 3)])
    graders.futures["a1", "answer a"].set_result(Grade("right", 1.0, True))
    with pytest.raises(DeadlineExceeded, match=r"gave up after 0.01 s waiting for 2 of 3 grades"):
        grading.wait([group("a", 3)], 0.01)


def test_a_grader_that_breaks_is_known_at_once() -> None:
    """Its error is there for whoever rolls out, while other grades are missing; two errors are as good as one."""
    grading, graders = begun([group("a", 3)])
    for i in (2, 0):
        graders.futures[f"a{i}", "answer a"].set_exception(RunError(f"grader of a{i} is gone"))
    with pytest.raises(RunError, match="grader of a2 is gone"):
        grading.broken.result(0)
    with pytest.raises(RunError, match="grader of a[02] is gone"):
        grading.wait([group("a", 3)], 60.0)


def test_only_failures_end_the_run() -> None:
    """One grade that did not fail is enough to go on."""
    for verdict in ("error", "timeout"):
        grading, graders = begun([group("a", 2)])
        graders.futures["a1", "answer a"].set_result(Grade(verdict, 0.0, True, "second"))
        graders.futures["a0", "answer a"].set_result(Grade("error", 0.0, True, "first"))
        if verdict == "error":
            with pytest.raises(RunError, match="reward.function: every one of 2 grades failed, the first with: first"):
                grading.wait([group("a", 2)], 1.0)
        else:
            assert [grade.verdict for grade in grading.wait([group("a", 2)], 1.0)[0]] == ["error", "timeout"]
