"""Logs metrics to Weights & Biases and MLflow, in addition to metrics.jsonl and TensorBoard.

The services' own variables say where: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ….
If a tracker fails mid-run, megarl warns once and stops using it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from megarl.config import Settings
from megarl.errors import UserError

PROJECT = "megarl"
IDS = "trackers.json"  # in the run directory: the services' ids of this run, which a resumed run continues


class Tracker(Protocol):
    """One service's record of this run."""

    id: str

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """A run of Weights & Biases. A step repeated after a crash keeps its first values there."""

    def __init__(self, settings: Settings, id: str | None) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        config = settings.model_dump(mode="json")
        self._run = wandb.init(project=project, name=settings.run.name, dir=str(settings.run), id=id, resume="allow",
                               config=config)  # fmt: skip
        self.id = self._run.id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow. Sends one step at a time, in the background. A repeated step has two values there."""

    def __init__(self, settings: Settings, id: str | None) -> None:
        import mlflow

        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        self._mlflow = mlflow
        self._sending: Any = None
        self.id = mlflow.start_run(run_id=id, run_name=None if id else settings.run.name).info.run_id
        if id is None:
            mlflow.log_params(_flat(settings.model_dump(mode="json")))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._wait()
        self._sending = self._mlflow.log_metrics(metrics, step=step, synchronous=False)

    def close(self) -> None:
        self._wait()
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()

    def _wait(self) -> None:
        """For the step before: MLflow loses metrics of two steps sent at once, and reports failures only here."""
        if self._sending is not None:
            self._sending.wait()


KINDS: dict[str, Callable[[Settings, str | None], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check(names: Sequence[str]) -> None:
    """Raises UserError if the library of a service is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install '{PROJECT}[{name}]'")


class Trackers:
    """All the services of a run, or none."""

    def __init__(self, settings: Settings, resume: bool) -> None:
        """Raises UserError if a service refuses (no login, no such server)."""
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
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(ids | {name: tracker.id for name, tracker in self._open.items()}))
            partial.replace(file)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as e:
                del self._open[name]
                print(f"trackers: {name} failed and is no longer used: {' '.join(str(e).split())}", file=sys.stderr)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as in an override."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
