"""Layouts that fit, ranked by time or by distance to the one in the settings."""

from __future__ import annotations

from collections.abc import Iterator
from math import log2

from megarl.config import Parallel, Settings
from megarl.errors import UserError
from megarl.models.layout import Layout as Divisions
from megarl.models.shape import ModelShape
from megarl.planner.hardware import Gpu
from megarl.planner.job import Plan, plan, recomputed

SIZES = (1, 2, 4, 8, 16, 32, 64)
RECOMPUTE = ("none", "selective", "full")


def candidates(settings: Settings, model: ModelShape, gpu: Gpu, gpus: int, response: float | None) -> Iterator[Plan]:
    """Every plan of a power-of-two layout that the model and the GPUs allow, fitting or not."""
    for parallel in _layouts(settings.parallel, model, gpus):
        try:
            Divisions(parallel.tp, parallel.pp, parallel.vpp, parallel.ep, parallel.etp).check(model)
            yield plan(settings.model_copy(update={"parallel": parallel}), model, gpu, gpus, response)
        except UserError:
            continue


def ranked(settings: Settings, model: ModelShape, gpu: Gpu, gpus: int, response: float | None) -> list[Plan]:
    """The plans that fit, fastest training first."""
    found = [p for p in candidates(settings, model, gpu, gpus, response) if p.fits]
    return sorted(found, key=lambda p: p.seconds["logprobs"] + p.seconds["train"])


def nearest_fit(settings: Settings, model: ModelShape, gpu: Gpu, gpus: int, response: float | None) -> Plan | None:
    """The fitting plan whose sizes differ least, in powers of two; of several the fastest. None when nothing fits."""
    wanted = settings.parallel
    found = ranked(settings, model, gpu, gpus, response)

    def distance(candidate: Plan) -> tuple[float, float]:
        place, recompute = candidate.layout, candidate.software.recompute
        pairs = ((place.tp, wanted.tp), (place.pp, wanted.pp), (place.cp, wanted.cp), (place.ep, wanted.ep))
        moved = sum(abs(log2(new / old)) for new, old in pairs)
        same = recompute == recomputed(wanted)
        return moved + (0 if same else 0.5), candidate.train.seconds

    return min(found, key=distance, default=None)


def settings_of(candidate: Plan) -> str:
    """A plan's layout as overrides."""
    place = candidate.layout
    sizes = {"tp": place.tp, "pp": place.pp, "vpp": place.vpp, "cp": place.cp, "ep": place.ep}
    recompute = candidate.software.recompute
    recompute = recompute if recompute in ("none", "full") else "selective"
    parts = [f"parallel.{name}={size}" for name, size in sizes.items() if size > 1 or name in ("tp", "pp")]
    return " ".join([*parts, f"parallel.recompute={recompute}"])


def _layouts(base: Parallel, model: ModelShape, gpus: int) -> Iterator[Parallel]:
    experts = [size for size in SIZES if model.moe and model.moe.count % size == 0] or [1]
    for tp in (size for size in SIZES[:4] if model.kv_groups % size == 0):
        for pp in (size for size in SIZES if model.layers % size == 0):
            chunks = [v for v in (1, 2, 4) if pp > 1 and model.layers % (pp * v) == 0] or [1]
            for cp in SIZES[:4]:
                if gpus % (tp * pp * cp):
                    continue
                for ep in experts:
                    if (gpus // (tp * pp)) % ep:
                        continue
                    for vpp in chunks:
                        for recompute in RECOMPUTE:
                            change = {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "ep": ep, "recompute": recompute}
                            if base.offload_layers and (pp > 1 or recompute != "none"):
                                continue
                            yield base.model_copy(update=change)
