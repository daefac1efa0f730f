"""Whether the policy closes its thoughts itself. Early exit must not teach a mark that the policy never writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megarl.errors import RunError
from megarl.rollout.early_exit.plan import ExitReason
from megarl.types import ScoredGroup

ENOUGH = 8  # responses that the policy ended itself, before their habit is judged
_INSERTED = (ExitReason.CONFIDENT, ExitReason.NEAR_BUDGET, ExitReason.REPETITION, ExitReason.BUDGET)


def check(groups: Sequence[ScoredGroup], think_end: str) -> str | None:
    """A warning where few of a step's responses close their thought themselves, else None. Call before training.

    Raises RunError if none of `ENOUGH` responses that the policy ended does, while early exit closed others.
    """
    reasons = Counter(str(c.completion.exit_reason) for group in groups for c in group.completions)
    closed, ended = reasons[ExitReason.THINK_END], reasons[ExitReason.THINK_END] + reasons[ExitReason.END_OF_TEXT]
    inserted = sum(reasons[reason] for reason in _INSERTED)
    if not inserted or 2 * closed >= max(ended, 1):
        return None
    found = (
        f"rollout.early_exit: {closed} of {ended} responses that the model ended itself close their thought with "
        f"{think_end!r}, and early exit wrote it into {inserted} others"
    )
    if closed or ended < ENOUGH:
        return f"{found}; `megarl markers` tells what fits this model"
    raise RunError(
        f"{found}: training would teach a mark that the model does not use. `megarl markers MODEL --prompts FILE` "
        "tells what fits; or teach it first (megarl sft), or train without early exit (recipe: grpo)"
    )
