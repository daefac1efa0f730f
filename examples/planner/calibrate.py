"""Fits `Laws` to measured step times, and measures how well fitted laws predict configurations outside the fit.

Coordinate descent on the logarithms of the constants, near their priors and inside physical bounds. Folds are whole
configuration groups (or whole sources), so no run of a held-out configuration is in the fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from math import exp, log
from statistics import mean, median
from typing import Any

from examples.planner.published import Run
from megarl.planner.hardware import Efficiency, Laws
from megarl.planner.steptime import step_time

Name = tuple[str, ...]  # ("nvlink",) or ("hopper", "fp8")

ABSENT = {("ampere", "fp8"), ("ampere", "fp4"), ("hopper", "fp4")}  # the chip has no such units
BOUNDS = {
    "bf16": (0.4, 0.9), "fp8": (0.3, 0.8), "fp4": (0.2, 0.8), "attention": (0.33, 0.8), "hbm": (0.5, 0.92),
    "nvlink": (0.45, 0.9), "network": (0.3, 0.95), "all_to_all": (0.25, 0.9),
    "tp_exposed": (0.05, 1), "cp_exposed": (0.05, 1), "ep_exposed": (0.1, 1), "ep_overlapped": (0.05, 0.6),
    "dp_exposed": (0.02, 1), "misaligned": (0.5, 1), "unaligned_heads": (0.2, 1), "flash1": (0.3, 1),
}  # fmt: skip
PRIORS = Laws(  # from data sheets, kernel benchmarks and collective tests, before any run
    ampere=Efficiency(bf16=0.8, fp8=0.8, fp4=0.8, attention=0.55, hbm=0.8),
    hopper=Efficiency(bf16=0.72, fp8=0.6, fp4=0.6, attention=0.55, hbm=0.8),
    blackwell=Efficiency(bf16=0.75, fp8=0.65, fp4=0.55, attention=0.55, hbm=0.7),
    nvlink=0.75, network=0.7, all_to_all=0.6, tp_exposed=0.4, cp_exposed=0.3, ep_exposed=0.8, ep_overlapped=0.3,
    dp_exposed=0.15, dense_gap=60.0, moe_gap=200.0, latency=15.0, eager=2.0, misaligned=0.85, unaligned_heads=0.5,
    flash1=0.6, straggler=0.004,
)  # fmt: skip
PRIOR_WEIGHT = 0.0045  # of the squared logarithmic distance from the prior


def group_errors(laws: Laws, groups: Sequence[Sequence[Run]]) -> list[list[float]]:
    """Relative error of the predicted step time of each run."""
    return [
        [step_time(r.shape, r.layout, r.software, r.gpu, laws).seconds / r.seconds - 1 for r in group if r.seconds]
        for group in groups
    ]


def fit(prior: Laws, groups: Sequence[Sequence[Run]], sweeps: int = 4) -> Laws:
    """The laws near `prior` that minimise the groups' mean error; large errors weigh more."""
    names = [n for n in _names(prior) if n not in ABSENT]

    def loss(laws: Laws) -> float:
        capped = [[min(abs(e), 0.6) for e in errors] for errors in group_errors(laws, groups)]
        misfit = mean(mean(e + 1.5 * e * e for e in errors) for errors in capped)
        return misfit + PRIOR_WEIGHT * sum(log(_get(laws, n) / _get(prior, n)) ** 2 for n in names)

    laws, best = prior, loss(prior)
    step = dict.fromkeys(names, 0.12)
    for _ in range(sweeps):
        for name in names:
            laws, best, moved = _descend(laws, best, name, step[name], loss)
            if not moved:
                step[name] /= 2
    return laws


def held_out_errors(
    prior: Laws, runs: Sequence[Run], key: Callable[[Run], str], folds: int, sweeps: int = 3
) -> list[float]:
    """Each group's median absolute error under laws fitted without its fold. A fold is a set of whole `key`s."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.group].append(run)
    fold_of = {name: i % folds for i, name in enumerate(sorted({key(group[0]) for group in groups.values()}))}
    errors = []
    for fold in sorted(set(fold_of.values())):
        inside = [g for g in groups.values() if fold_of[key(g[0])] == fold]
        laws = fit(prior, [g for g in groups.values() if fold_of[key(g[0])] != fold], sweeps)
        errors += [median(abs(e) for e in group) for group in group_errors(laws, inside)]
    return errors


def _descend(
    laws: Laws, best: float, name: Name, step: float, loss: Callable[[Laws], float]
) -> tuple[Laws, float, bool]:
    """Move one constant downhill in steps of `step` (natural logarithm)."""
    low, high = BOUNDS.get(name[-1], (1e-6, 1e6))
    moved = False
    for sign in (1, -1):
        while True:
            candidate = _set(laws, name, min(high, max(low, _get(laws, name) * exp(sign * step))))
            value = loss(candidate)
            if value >= best - 1e-6:
                break
            laws, best, moved = candidate, value, True
        if moved:
            break
    return laws, best, moved


def _names(laws: Laws) -> list[Name]:
    names: list[Name] = []
    for f in fields(laws):
        value = getattr(laws, f.name)
        names += [(f.name, e.name) for e in fields(value)] if isinstance(value, Efficiency) else [(f.name,)]
    return names


def _get(laws: Laws, name: Name) -> float:
    return getattr(laws, name[0]) if len(name) == 1 else getattr(getattr(laws, name[0]), name[1])


def _set(laws: Laws, name: Name, value: float) -> Laws:
    changed: Any = value if len(name) == 1 else replace(getattr(laws, name[0]), **{name[1]: value})
    return replace(laws, **{name[0]: changed})
