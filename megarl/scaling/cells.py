"""Measuring or predicting a cell, once: its figures are kept in a file, and what has a file is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl import config
from megarl.config import Settings
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.families import parameters
from megarl.planner import hardware
from megarl.planner.job import plan
from megarl.scaling.study import GPUS, PARAMETERS, TO_TARGET, Cell, Study, cells

Figures = dict[str, float | None]


def missing(study: Study, folder: Path) -> list[int]:
    """Numbers of the cells that have no figures yet."""
    return [i for i, cell in enumerate(cells(study)) if not _file(folder, cell).is_file()]


def do(study: Study, number: int, folder: Path) -> Figures:
    """The figures of a cell: read when they are there, else made and kept. A run cut short is resumed."""
    cell = cells(study)[number]
    settings = settings_of(study, cell, folder)
    made, file = _made(study, cell, settings), _file(folder, cell)
    if file.is_file():
        kept = json.loads(file.read_text())
        if not _same(kept["made"], made):
            raise UserError(f"study: {file} was made with other settings; remove it, or name another --out")
        return kept["figures"]
    figures = _MAKERS[study.how](study, cell, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({"made": made, "figures": figures}, indent=1) + "\n")
    partial.replace(file)
    return figures


def check(study: Study, folder: Path) -> None:
    """Refuse what cannot run before the first cell does; raises UserError, naming the cell."""
    for cell in cells(study):
        try:
            settings = settings_of(study, cell, folder)
            if study.how == "local":
                from megarl.launch import preflight  # the trainer, which predictions do without

                preflight(settings, cell.ranks or settings.parallel.model_ranks, resume=True)
        except UserError as e:
            raise UserError(f"study: {cell.name}: {e}") from None


def results(study: Study, folder: Path) -> list[dict[str, Any]]:
    """One row a cell that is done: the point, the seed, the figures."""
    there = [(i, cell) for i, cell in enumerate(cells(study)) if _file(folder, cell).is_file()]
    rows = []
    for i, cell in there:
        row = {**cell.point, "seed": cell.seed, **do(study, i, folder)}
        if study.x == PARAMETERS:
            row[PARAMETERS] = parameters(read_shape(settings_of(study, cell, folder).model.path))
        rows.append(row)
    return rows


def settings_of(study: Study, cell: Cell, folder: Path) -> Settings:
    """The run of a cell; its directory is below the study's. Raises UserError."""
    chosen = {**study.settings, **cell.point}
    overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if key != GPUS]
    run = folder / "runs" / cell.name
    return config.load(study.base, [*overrides, f"seed={cell.seed}", f"run={json.dumps(str(run))}"])


def measured(study: Study, cell: Cell, settings: Settings) -> Figures:
    """Train the cell's run and take its figures: seconds are those of steps, evaluation and checkpoints apart."""
    from megarl.bench.common import training_runs as runs

    metrics = runs.trained(settings, cell.ranks)
    steps = [line for line in metrics if "seconds_total" in line and line["step"] > study.skip]
    if not steps:
        raise UserError(f"study: skip: {study.skip} leaves no step of {settings.steps}; at most {settings.steps - 1}")
    seconds = sum(line["seconds_total"] - line.get("seconds_evaluation", 0.0) - line.get("seconds_checkpoint", 0.0)
                  for line in steps)  # fmt: skip
    trained = sum(line["seconds_train"] + line["seconds_logprobs"] for line in steps)
    accuracies = [line["eval/accuracy"] for line in metrics if "eval/accuracy" in line]

    def mean(key: str) -> float:
        return sum(line[key] for line in steps) / len(steps)

    return {
        "step_seconds": seconds / len(steps),
        "tokens_per_second": sum(line["tokens_generated"] for line in steps) / seconds,
        "rollout_tokens_per_second": mean("tokens_generated") / mean("seconds_rollout"),
        "train_tokens_per_second": sum(line["tokens_trained"] for line in steps) / trained,
        **{key: mean(key) for key in ("reward", "response_tokens", "packing_density", "effective_sample_size")},
        "grad_norm": mean("grad_norm"),
        "accuracy": accuracies[-1] if accuracies else None,
        TO_TARGET: None if study.target is None else reached(metrics, study.target),
    }


def reached(metrics: list[dict[str, Any]], target: float) -> float | None:
    """Seconds of training, evaluation and checkpoints apart, to the held-out accuracy `target`; None = never there."""
    from megarl.bench import dppo

    there = dppo.reached(dppo.learning_curve(metrics), target)
    return None if there is None else there["seconds"]


def predicted(study: Study, cell: Cell, settings: Settings) -> Figures:
    """What the planner says of the cell; `fits` is 1 or 0."""
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


def _made(study: Study, cell: Cell, settings: Settings) -> dict[str, Any]:
    """All that a cell's figures depend on, the code apart; not where they are kept."""
    asked = {"local": ("skip", "target"), "predicted": ("gpu", "response_tokens")}[study.how]
    chosen = settings.model_dump(mode="json", exclude={"run"})
    return {"how": study.how, "gpus": cell.ranks, **{key: getattr(study, key) for key in asked}, "settings": chosen}


def _same(kept: dict[str, Any], made: dict[str, Any]) -> bool:
    """Settings are compared parsed, so that one added since then has its default."""
    both = []
    for tree in (kept, made):
        try:
            both.append({**tree, "settings": config.parse({**tree["settings"], "run": "."})})
        except UserError:  # made with a setting that is gone
            return False
    return both[0] == both[1]


def _file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


_MAKERS: dict[str, Callable[[Study, Cell, Settings], Figures]] = {"local": measured, "predicted": predicted}
