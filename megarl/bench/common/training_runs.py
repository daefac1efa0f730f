"""Real training runs of a study. A finished run is not repeated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megarl import config
from megarl.config import Settings
from megarl.errors import UserError
from megarl.evaluate import evaluate
from megarl.run.directory import read_metrics
from megarl.runtime.spawn import spawn
from megarl.sft import sft
from megarl.train import train

QUICKSTART = Path("examples/quickstart/train.yaml")


def settings(base: Path, run: Path, seed: int, overrides: list[str]) -> Settings:
    """The settings of one run of a study."""
    if not base.is_file():
        raise UserError(f"config: {base} does not exist; run this benchmark from the repository's root")
    return config.load(base, [*overrides, f"run={run}", f"seed={seed}"])


def trained(wanted: Settings, ranks: int | None = None) -> list[dict[str, Any]]:
    """The metrics of the finished run of these settings. It is trained now if absent, and resumed if half-done.

    `ranks`: default one copy of the model.
    """
    state = _state(wanted)
    if state == "other":
        raise UserError(f"run: {wanted.run} was made with other settings; remove it or name another folder")
    if state != "done":
        spawn(train, ranks or wanted.parallel.model_ranks, (wanted, state == "begun"))
    return read_metrics(wanted.run)


def taught(wanted: Settings, ranks: int) -> list[dict[str, Any]]:
    """Like `trained`, for supervised fine-tuning: the metrics of every update. A half-done run starts anew."""
    made = wanted.run / "settings.yaml"  # written at the end
    if made.is_file() and config.load(made) != wanted:
        raise UserError(f"run: {wanted.run} was made with other settings; remove it or name another folder")
    if not made.is_file():
        forget(wanted.run)
        spawn(sft, ranks, (wanted,))
        made.write_text(config.dump(wanted))
    return read_metrics(wanted.run)


def evaluated(
    wanted: Settings, temperatures: list[float], after_training: bool = True, name: str = "evaluation"
) -> list[dict[str, Any]]:
    """Held-out metrics at each temperature, of the run's newest checkpoint or of the model it starts from.

    They are kept in a file `name` of the run directory.
    """
    file = wanted.run / f"{name}_{'after' if after_training else 'before'}.json"
    if file.is_file():
        rows = json.loads(file.read_text())
        if [row["temperature"] for row in rows] == temperatures:
            return rows
    rows = spawn(evaluate, wanted.parallel.model_ranks, (wanted, after_training, temperatures))[0]
    wanted.run.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))
    return rows


def forget(run: Path) -> None:
    """Remove a run of a study so that it is measured again."""
    shutil.rmtree(run, ignore_errors=True)


def _state(wanted: Settings) -> str:
    """new, begun, done, or other (the folder has a run of other settings)."""
    if not (wanted.run / "metrics.jsonl").is_file():
        return "new"
    try:  # parsed, so that a setting added since then has its default
        made = config.load(wanted.run / "config.yaml")
    except UserError:
        return "other"
    if made != wanted:
        return "other"
    metrics = read_metrics(wanted.run)
    return "done" if metrics and metrics[-1]["step"] == wanted.steps else "begun"
