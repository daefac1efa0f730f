"""The kinds of GPU that a run fits on, for `--dry-run`: from sizes alone, within a second. `megarl plan` says more."""

from __future__ import annotations

from megarl.config import Settings
from megarl.errors import UserError
from megarl.models.shape import ModelShape
from megarl.planner.command import refusal
from megarl.planner.hardware import GIB, GPUS, Gpu
from megarl.planner.job import check_engine_flags, plan, runnable
from megarl.planner.search import nearest_fit


def fitting(settings: Settings, model: ModelShape, ranks: int) -> str:
    """Memory of the fullest rank, with each rank on one GPU, and the kinds of GPU that have enough.

    Raises UserError if no kind has enough, naming what overflows and the nearest layout that fits. Also raises it for
    flags of the rollout engine that do not suit the model.
    """
    check_engine_flags(settings, model)
    plans = {name: plan(settings, model, card, ranks) for name, card in GPUS.items() if _runs(settings, card)}
    having = [name for name, one in plans.items() if one.fits]
    if not having:
        largest = max(plans.values(), key=lambda one: one.gpu.memory)
        raise UserError(refusal(largest, nearest_fit(settings, model, largest.gpu, ranks, None)))
    one = plans[having[0]]
    peak = one.peak
    return (
        f"{peak.driver(one.layout):.1f} GiB in the fullest rank on {having[0]}, most of it {peak.largest} "
        f"({peak.parts[peak.largest] / GIB:.1f} GiB); fits {', '.join(having)}"
    )


def _runs(settings: Settings, card: Gpu) -> bool:
    """Whether this kind of GPU computes in the run's precision."""
    try:
        runnable(settings.precision, card)
    except UserError:
        return False
    return True
