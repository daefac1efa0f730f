"""Logs metrics to Weights & Biases and MLflow, in addition to metrics.jsonl and TensorBoard.

The services' own variables say where: WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ….
Each service has a thread, so training never waits for one. megarl warns once about a service that fails, or does not
answer for `TIMEOUT` seconds, and stops using it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Protocol

from megarl.config import Settings
from megarl.errors import UserError
from megarl.run.atomic import write_text

TIMEOUT = 60.0  # seconds without an answer
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
    """A run of MLflow. A repeated step has two values there."""

    def __init__(self, settings: Settings, id: str | None) -> None:
        import mlflow

        if "MLFLOW_EXPERIMENT_NAME" not in os.environ and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(PROJECT)
        self._mlflow = mlflow
        self.id = mlflow.start_run(run_id=id, run_name=None if id else settings.run.name).info.run_id
        if id is None:
            mlflow.log_params(_flat(settings.model_dump(mode="json")))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        # Not in MLflow's own background: Python would wait for that at the end, for as long as a server hangs.
        self._mlflow.log_metrics(metrics, step=step, synchronous=True)

    def close(self) -> None:
        self._mlflow.end_run()


KINDS: dict[str, Callable[[Settings, str | None], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check(names: Sequence[str]) -> None:
    """Raises UserError if the library of a service is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install '{PROJECT}[{name}]'")


class Trackers:
    """All the services of a run, or none."""

    def __init__(self, settings: Settings, resume: bool, timeout: float = TIMEOUT) -> None:
        """Raises UserError if a service refuses (no login, no such server) or does not answer within `timeout`."""
        check(settings.trackers)
        file = settings.run / IDS
        ids = json.loads(file.read_text()) if resume and file.is_file() else {}
        self._open = [_Service(name, settings, ids.get(name), timeout) for name in settings.trackers]
        for service in self._open:
            ids[service.name] = service.started()
        if self._open:
            write_text(file, json.dumps(ids))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hand the metrics over. Returns at once."""
        for service in self._open:
            service.log(step, metrics)

    def close(self) -> None:
        """Wait until the services have everything, at most the timeout for each."""
        for service in self._open:
            service.close()
        self._open.clear()


class _Service:
    """A tracker in a thread that makes all its calls, as libraries keep the current run by thread."""

    def __init__(self, name: str, settings: Settings, id: str | None, timeout: float) -> None:
        self.name, self._timeout = name, timeout
        self._calls: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._id: Future[str] = Future()
        self._since: float | None = None  # the call in progress began then
        self._lock, self._given_up = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, args=(settings, id), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def started(self) -> str:
        """The service's id of the run. Raises UserError."""
        try:
            return self._id.result(self._timeout)
        except TimeoutError:
            raise UserError(f"trackers: {self.name} gave no answer within {self._timeout:g} s") from None
        except Exception as e:
            raise UserError(f"trackers: {self.name}: {' '.join(str(e).split())}") from None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        since = self._since
        if since is not None and time.monotonic() - since > self._timeout:
            self._give_up(f"no answer within {self._timeout:g} s")
        if not self._given_up:
            self._calls.put(lambda tracker: tracker.log(step, metrics))

    def close(self) -> None:
        if self._given_up:
            return
        self._calls.put(lambda tracker: tracker.close())
        self._calls.put(None)
        self._thread.join(self._timeout)
        if self._thread.is_alive():
            self._give_up(f"at the end it has not taken all metrics within {self._timeout:g} s")

    def _run(self, settings: Settings, id: str | None) -> None:
        try:
            tracker = KINDS[self.name](settings, id)
            self._id.set_result(tracker.id)
        except BaseException as e:
            self._id.set_exception(e)
            return
        while (call := self._calls.get()) and not self._given_up:
            self._since = time.monotonic()
            try:
                call(tracker)
            except BaseException as e:
                self._give_up(" ".join(str(e).split()))
                return
            self._since = None

    def _give_up(self, why: str) -> None:
        with self._lock:
            if not self._given_up:
                self._given_up = True
                print(f"trackers: {self.name} failed and is no longer used: {why}", file=sys.stderr)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as in an override."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
