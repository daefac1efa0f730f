"""One cell of a study: measured or predicted once. Its metrics are kept in a file, and a cell with a file is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl import config
from megarl.bench.common.curve import learning_curve, reached, train_seconds
from megarl.config import Settings
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.planner import hardware
from megarl.planner.job import plan
from megarl.run.atomic import write_text
from megarl.run.directory import read_metrics
from megarl.scaling.study import GPUS, NODES, PARAMETERS, TO_TARGET, Cell, Study, cells

Metrics = dict[str, float | None]


def missing(study: Study, folder: Path) -> list[int]:
    """Numbers of the cells that have no metrics yet."""
    return [i for i, cell in enumerate(cells(study)) if not _done(study, cell, folder)]


def do(study: Study, number: int, folder: Path) -> Metrics:
    """The metrics of a cell, from its file if it has one. A training run that was cut short is resumed."""
    cell = cells(study)[number]
    settings = settings_of(study, cell, folder)
    made, file = _made(study, cell, settings), _file(folder, cell)
    if file.is_file():
        kept = json.loads(file.read_text())
        if "metrics" not in kept or not _same(kept["made"], made):
            raise UserError(f"study: {file} was made with other settings; remove it, or name another --out")
        return kept["metrics"]
    metrics = _MAKERS[study.how](study, cell, settings)
    write_text(file, json.dumps({"made": made, "metrics": metrics}, indent=1) + "\n")
    return metrics


def check(study: Study, folder: Path) -> None:
    """Refuse what cannot run before the first cell runs; raises UserError, naming the cell."""
    for cell in cells(study):
        try:
            settings = settings_of(study, cell, folder)
            if study.how == "local":
                from megarl.launch import preflight  # imports the trainer, which predictions do not need

                preflight(settings, cell.ranks or settings.parallel.model_ranks, resume=True)
        except UserError as e:
            raise UserError(f"study: {cell.name}: {e}") from None
    if study.script and not (study.script.is_file() and str(study.base) in study.script.read_text()):
        raise UserError(f"script: {study.script} is not a script that trains {study.base}")


def results(study: Study, folder: Path) -> list[dict[str, Any]]:
    """One row for each cell that is done: its point, its seed, its metrics."""
    rows = []
    for i, cell in enumerate(cells(study)):
        if not _done(study, cell, folder):
            continue
        row = {**cell.point, "seed": cell.seed, **do(study, i, folder)}
        if study.x == PARAMETERS:
            row[PARAMETERS] = read_shape(settings_of(study, cell, folder).model.path).parameters()
        rows.append(row)
    return rows


def settings_of(study: Study, cell: Cell, folder: Path) -> Settings:
    """The settings of a cell's run, whose directory is inside the study's. Raises UserError."""
    return config.load(study.base, [*_overrides(study, cell), f"run={json.dumps(str(_run(folder, cell)))}"])


def job(study: Study, number: int, folder: Path) -> tuple[int, Path, list[str]]:
    """What the Slurm job of a cell needs: its number of nodes, its run directory, its settings as key=value."""
    cell = cells(study)[number]
    assert cell.nodes is not None
    return cell.nodes, _run(folder, cell), _overrides(study, cell)


def measured(study: Study, cell: Cell, settings: Settings) -> Metrics:
    """Train the cell's run and measure it."""
    from megarl.bench.common import training_runs

    return summarise(study, settings, training_runs.trained(settings, cell.ranks))


def recorded(study: Study, cell: Cell, settings: Settings) -> Metrics:
    """Measure the run that the cell's Slurm job has finished."""
    return summarise(study, settings, read_metrics(settings.run))


def summarise(study: Study, settings: Settings, lines: list[dict[str, Any]]) -> Metrics:
    """A run's metrics; seconds are those of its steps, without evaluation and checkpoints."""
    steps = [line for line in lines if "seconds_total" in line and line["step"] > study.skip]
    if not steps:
        raise UserError(f"study: skip: {study.skip} leaves no step of {settings.steps}; at most {settings.steps - 1}")
    seconds = sum(map(train_seconds, steps))
    trained = sum(line["seconds_train"] + line["seconds_logprobs"] for line in steps)
    accuracies = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    there = None if study.target is None else reached(learning_curve(lines), study.target)

    def mean(key: str) -> float:
        return sum(line[key] for line in steps) / len(steps)

    return {
        "step_seconds": seconds / len(steps),
        "sync_seconds": mean("seconds_sync"),
        "tokens_per_second": sum(line["tokens_generated"] for line in steps) / seconds,
        "rollout_tokens_per_second": mean("tokens_generated") / mean("seconds_rollout"),
        "train_tokens_per_second": sum(line["tokens_trained"] for line in steps) / trained,
        **{key: mean(key) for key in ("reward", "response_tokens", "packing_density", "effective_sample_size")},
        "grad_norm": mean("grad_norm"),
        "accuracy": accuracies[-1] if accuracies else None,
        TO_TARGET: there and there["seconds"],
    }


def predicted(study: Study, cell: Cell, settings: Settings) -> Metrics:
    """The planner's prediction of the cell; `fits` is 1 or 0."""
    gpus = cell.ranks or settings.parallel.model_ranks * settings.parallel.ep
    found = plan(settings, read_shape(settings.model.path), hardware.gpu(study.gpu), gpus, study.response_tokens)
    return {
        "step_seconds": found.step_seconds,
        "tokens_per_second": found.tokens / found.step_seconds,
        "train_tokens_per_second": found.tokens / (found.seconds["train"] + found.seconds["logprobs"]),
        "mfu": found.mfu,
        "peak_gib": found.peak.driver(found.layout),
        "fits": float(found.fits),
        "gpu_hours_per_100_steps": found.gpu_hours,
    }


def _overrides(study: Study, cell: Cell) -> list[str]:
    chosen = {**study.settings, **cell.point}
    return [*(f"{k}={json.dumps(v)}" for k, v in chosen.items() if k not in (GPUS, NODES)), f"seed={cell.seed}"]


def _made(study: Study, cell: Cell, settings: Settings) -> dict[str, Any]:
    """Everything that a cell's metrics depend on, except the code and the place where they are kept."""
    keys = ("gpu", "response_tokens") if study.how == "predicted" else ("skip", "target")
    chosen = settings.model_dump(mode="json", exclude={"run"})
    place = {"gpus": cell.ranks} | ({NODES: cell.nodes} if study.how == "slurm" else {})
    return {"how": study.how, **place, **{key: getattr(study, key) for key in keys}, "settings": chosen}


def _same(kept: dict[str, Any], made: dict[str, Any]) -> bool:
    """Compare with the settings parsed, so that a setting added since then has its default."""
    both = []
    for tree in (kept, made):
        try:
            both.append({**tree, "settings": config.parse({**tree["settings"], "run": "."})})
        except UserError:  # made with a setting that is gone
            return False
    return both[0] == both[1]


def _done(study: Study, cell: Cell, folder: Path) -> bool:
    """Whether a cell has its file or, in a slurm study, its run has reached the last step."""
    if _file(folder, cell).is_file() or study.how != "slurm":
        return _file(folder, cell).is_file()
    run = _run(folder, cell)
    lines = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    return bool(lines) and lines[-1]["step"] >= settings_of(study, cell, folder).steps


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _run(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / cell.name


_MAKERS: dict[str, Callable[[Study, Cell, Settings], Metrics]] = {
    "local": measured,
    "slurm": recorded,
    "predicted": predicted,
}
