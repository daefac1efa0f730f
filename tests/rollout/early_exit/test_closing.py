"""A model that never closes its thoughts is not taught to by what early exit wrote into them."""

import numpy as np
import pytest

from megarl.errors import RunError
from megarl.rollout.early_exit.closing import ENOUGH, check
from megarl.types import Completion, Prompt, ScoredCompletion, ScoredGroup


def group(**reasons: int) -> list[ScoredGroup]:
    """One group with so many completions of each exit reason."""
    none = np.empty(0, np.int32)
    made = [
        ScoredCompletion(Completion("p", 0, none, none, none, "stop", exit_reason=reason), "wrong", 0.0, False, 1, 0.0)
        for reason, count in reasons.items()
        for _ in range(count)
    ]
    return [ScoredGroup(Prompt("p", (1,), "?", "1", "a.jsonl:1"), made, 1.0)]


@pytest.mark.parametrize("inserted", ["confident", "near_budget", "repetition", "budget"])
def test_a_model_that_never_closes_is_refused(inserted: str) -> None:
    with pytest.raises(RunError, match="0 of 8 responses .*'</think>'.* wrote it into 3 others.*megarl markers"):
        check(group(end_of_text=ENOUGH, **{inserted: 3}), "</think>")


@pytest.mark.parametrize(
    ("reasons", "warns"),
    [
        ({"end_of_text": 20}, False),  # nothing was written into them
        ({"plain": 20}, False),
        ({"think_end": 10, "end_of_text": 5, "budget": 5}, False),
        ({"think_end": 1, "end_of_text": 20, "confident": 5}, True),
        ({"end_of_text": ENOUGH - 1, "confident": 5}, True),
        ({"budget": 8}, True),
    ],
)
def test_few_closings_are_told(reasons: dict[str, int], warns: bool) -> None:
    warning = check(group(**reasons), "</think>")
    assert bool(warning) is warns
    if warning:
        assert f"{reasons.get('think_end', 0)} of " in warning and "megarl markers" in warning
