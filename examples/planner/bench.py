"""The planner's step time, memory and "does it fit" against published runs.

Each row of a CSV of runs (columns: published.py) is predicted and scored by configuration group. A
group's error is the median of its runs' errors, so a configuration that was measured often does not count more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from examples.planner.calibrate import PRIORS, fit, held_out_errors
from examples.planner.published import Run, Skipped, read
from megarl.bench.common import result
from megarl.errors import UserError
from megarl.planner.hardware import LAWS, Laws
from megarl.planner.memory import StageMemory, fits, plan_memory
from megarl.planner.steptime import step_time

RUNS = Path(__file__).with_name("published_runs.csv")
WORST = 10
CONFIGURATION_FOLDS = 5


def main(
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    runs: Annotated[Path, typer.Option(help="CSV of published runs.")] = RUNS,
    cross_validate: Annotated[
        bool, typer.Option("--cross-validate", help="Refit without each fifth of the configurations, and each source.")
    ] = False,
    refit: Annotated[bool, typer.Option(help="Fit the constants to all runs and print them.")] = False,
) -> None:
    """Score predicted step time and memory against published runs."""
    if not runs.is_file():
        raise UserError(f"--runs: {runs} does not exist")
    found, skipped = read(runs)
    if not found:
        raise UserError(f"runs: {runs} has no run that can be predicted ({len(skipped)} skipped)")
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
            details[f"time_p90_abs_error_unseen_{name}"] = float(np.quantile(errors, 0.9))
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
    """(the worst ten runs, the summary, its details)."""
    time: dict[str, list[tuple[float, Run]]] = defaultdict(list)
    memory: dict[tuple[str, str], list[float]] = defaultdict(list)  # by source and group
    right: list[bool] = []
    stated: list[bool] = []  # the same for the runs whose recomputation is published
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
        "time_p90_abs_error": float(np.quantile(errors, 0.9)) if errors else None,
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
    # No constant of the memory model is fitted to a source, so each source is a test of its own.
    for source in sorted({source for source, _ in memory}):
        details[f"memory_median_abs_error_{source}"] = median(median(g) for (s, _), g in memory.items() if s == source)
    return rows, summary, details


def _fits(run: Run) -> bool:
    """Whether the run fits. If its recomputation is not published: whether some recomputation makes it fit."""
    modes = [run.software.recompute] if run.recompute_stated else [run.software.recompute, "selective", "moe", "full"]
    return any(
        fits(plan_memory(run.shape, run.layout, replace(run.software, recompute=mode)), run.layout, run.gpu)
        for mode in modes
    )


def _as_measured(stage: StageMemory, run: Run) -> float:
    """GiB as the source defines memory."""
    if run.memory_kind == "driver":
        return stage.driver(run.layout)
    return stage.reserved() if run.memory_kind == "reserved" else stage.allocated
