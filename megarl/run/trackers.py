"""Figures to Weights & Biases and MLflow, beside metrics.jsonl and TensorBoard. Called by run/directory.py.

Where they go is each service's own business: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ….
A service that fails later on is told of once and left alone; training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megarl.config import Settings
from megarl.errors import UserError

PROJECT = "megarl"
IDS = "trackers.json"  # in the run directory: the services' names of this run, which a resumed one goes on with


class Tracker(Protocol):
    """One service's record of this run."""

    id: str

    def log(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """A run of Weights & Biases. It takes no step twice: those done again after a crash are shown as they were."""

    def __init__(self, settings: Settings, id: str | None) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        config = settings.model_dump(mode="json")
        self._run = wandb.init(project=project, name=settings.run.name, dir=str(settings.run), id=id, resume="allow",
                               config=config)  # fmt: skip
        self.id = self._run.id

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow; figures are sent in the background, a step at a time. A step done again has two values."""

    def __init__(self, settings: Settings, id: str | None) -> None:
        import mlflow

        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        self._mlflow = mlflow
        self._sending: Any = None
        self.id = mlflow.start_run(run_id=id, run_name=None if id else settings.run.name).info.run_id
        if id is None:
            mlflow.log_params(_flat(settings.model_dump(mode="json")))

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._wait()
        self._sending = self._mlflow.log_metrics(figures, step=step, synchronous=False)

    def close(self) -> None:
        self._wait()
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()

    def _wait(self) -> None:
        """For the step before: MLflow's threads lose figures of two sent at once, and tell of failures only here."""
        if self._sending is not None:
            self._sending.wait()


KINDS: dict[str, Callable[[Settings, str | None], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check(names: Sequence[str]) -> None:
    """Refuse services whose library is missing; raises UserError."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install '{PROJECT}[{name}]'")


class Trackers:
    """All the services of a run, or none."""

    def __init__(self, settings: Settings, resume: bool) -> None:
        """Raises UserError when a service refuses (no login, no such server)."""
        check(settings.trackers)
        file = settings.run / IDS
        ids = json.loads(file.read_text()) if resume and file.is_file() else {}
        self._open: dict[str, Tracker] = {}
        for name in settings.trackers:
            try:
                self._open[name] = KINDS[name](settings, ids.get(name))
            except Exception as e:
                raise UserError(f"trackers: {name}: {' '.join(str(e).split())}") from None
        if self._open:
            _write(file, ids | {name: tracker.id for name, tracker in self._open.items()})

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, figures))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as e:
                del self._open[name]
                print(f"trackers: {name} FAILED and gets no more figures: {' '.join(str(e).split())}", file=sys.stderr)


def _write(file: Path, ids: dict[str, str]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(ids))
    partial.replace(file)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as they are written in an override: dotted."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
