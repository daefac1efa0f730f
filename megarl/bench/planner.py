"""`megarl bench planner`: the planner against published runs.

A CSV of runs (see megarl/planner/published.py for the columns) is predicted row by row and scored by configuration
group: a group's error is the median of its runs', so that a configuration measured often does not count more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from megarl.bench.common import result
from megarl.errors import UserError
from megarl.planner.calibrate import PRIORS, fit, held_out_errors
from megarl.planner.hardware import LAWS, Laws
from megarl.planner.memory import StageMemory, fits, plan_memory
from megarl.planner.published import Run, Skipped, read
from megarl.planner.steptime import step_time

WORST = 10
CONFIGURATION_FOLDS = 5


def main(
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    runs: Annotated[Path | None, typer.Option(help="CSV of published runs; there is none in the repository.")] = None,
    cross_validate: Annotated[
        bool, typer.Option("--cross-validate", help="Refit without each fifth of the configurations, and each source.")
    ] = False,
    refit: Annotated[bool, typer.Option(help="Fit the constants to all runs and print them.")] = False,
) -> None:
    """Score predicted step time and memory against published runs."""
    if runs is None:
        raise UserError("runs: no CSV of published runs given; pass --runs FILE")
    found, skipped = read(runs)
    if not found:
        raise UserError(f"runs: {runs} holds no run that can be predicted ({len(skipped)} skipped)")
    rows, summary, details = score(found, skipped)
    if cross_validate:
        timed = [run for run in found if run.seconds]
        held_out = {
            "configurations": (lambda r: r.group, CONFIGURATION_FOLDS),
            "sources": (lambda r: r.source, len(timed)),
        }
        for name, (key, folds) in held_out.items():
            errors = sorted(held_out_errors(PRIORS, timed, key, folds))
            details[f"time_median_abs_error_unseen_{name}"] = median(errors)
            details[f"time_p90_abs_error_unseen_{name}"] = quantile(errors, 0.9)
    reasons = dict(Counter(s.reason for s in skipped).most_common())
    result.publish("planner", rows, json, summary=summary, details=details, skipped=reasons)
    for name, value in (summary | details).items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    for reason, count in reasons.items():
        print(f"skipped {count}: {reason}")
    if refit:
        groups: dict[str, list[Run]] = defaultdict(list)
        for run in found:
            if run.seconds:
                groups[run.group].append(run)
        print(fit(PRIORS, list(groups.values())))


def score(
    runs: list[Run], skipped: list[Skipped], laws: Laws = LAWS
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(the worst ten runs, the summary, what is behind it)."""
    time: dict[str, list[tuple[float, Run]]] = defaultdict(list)
    memory: dict[tuple[str, str], list[float]] = defaultdict(list)  # by source and group
    right: list[bool] = []
    stated: list[bool] = []  # the same, of the runs whose recomputation is published
    for run in runs:
        stages = plan_memory(run.shape, run.layout, run.software)
        right.append(_fits(run) == run.fits)
        if run.recompute_stated:
            stated.append(right[-1])
        if run.seconds:
            predicted = step_time(run.shape, run.layout, run.software, run.gpu, laws).seconds
            time[run.group].append((predicted / run.seconds - 1, run))
        if run.memory:
            peak = max(_as_measured(stage, run) for stage in stages)
            memory[run.source, run.group].append(abs(peak / run.memory - 1))
    errors = sorted(median(abs(e) for e, _ in group) for group in time.values())
    worst = sorted((pair for group in time.values() for pair in group), key=lambda pair: -abs(pair[0]))[:WORST]
    rows = [
        {"id": run.id, "group": run.group, "run": run.label, "time_error": error, "measured_s": run.seconds}
        for error, run in worst
    ]
    summary = {
        "time_median_abs_error": median(errors) if errors else None,
        "time_p90_abs_error": quantile(errors, 0.9) if errors else None,
        "memory_median_abs_error": median(median(g) for g in memory.values()) if memory else None,
        "fits_accuracy": sum(right) / len(right),
        "scored": len(runs),
        "skipped": len(skipped),
    }
    details = {
        "time_groups": len(time),
        "memory_groups": len(memory),
        "fits_accuracy_recompute_stated": sum(stated) / len(stated) if stated else None,
        "recompute_unstated": sum(not run.recompute_stated for run in runs),
    }
    # The memory model has no constant fitted to a source, so each source tests it apart.
    for source in sorted({source for source, _ in memory}):
        details[f"memory_median_abs_error_{source}"] = median(median(g) for (s, _), g in memory.items() if s == source)
    return rows, summary, details


def quantile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the entries of an ordered list."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _fits(run: Run) -> bool:
    """Whether the run fits; where its recomputation is not published, whether some recomputation makes it fit."""
    modes = [run.software.recompute] if run.recompute_stated else [run.software.recompute, "selective", "moe", "full"]
    return any(
        fits(plan_memory(run.shape, run.layout, replace(run.software, recompute=mode)), run.layout, run.gpu)
        for mode in modes
    )


def _as_measured(stage: StageMemory, run: Run) -> float:
    """GiB in the source's own definition."""
    if run.memory_kind == "driver":
        return stage.driver(run.layout)
    return stage.reserved() if run.memory_kind == "reserved" else stage.allocated
