"""Metrics that also go to W&B and MLflow. The stand-ins prove what is called; the libraries themselves are used too,
W&B offline, MLflow with a folder. Not proven: anything of their servers."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megarl import config
from megarl.errors import UserError
from megarl.run import trackers
from megarl.run.directory import RunDirectory, read_metrics


def settings(folder: Path, *names: str) -> config.Settings:
    return config.parse({"run": folder, "model": {"path": "m"}, "data": {"train": ["t"]}, "trackers": list(names)})


def write(wanted: config.Settings, steps: range, resume_step: int | None) -> None:
    run = RunDirectory(wanted.run, wanted, resume_step)
    for step in steps:
        run.metrics(step, {"reward": step / 2, "eval/accuracy": 0.5, "loss": float("nan"), "note": "text"})
    run.close()


class StandIn:
    """Both services' calls, as written in their documentation, into lists."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str | None] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended, self.broken = 0, False
        self.silent: threading.Event | None = None  # set, it answers again
        self.asked = threading.Event()
        self._offer(monkeypatch, "wandb", init=self._init)
        self._offer(monkeypatch, "mlflow", set_experiment=lambda name: None, log_params=lambda flat: None,
                    start_run=lambda run_id, run_name: SimpleNamespace(info=self._info(run_id)),
                    log_metrics=lambda metrics, step, synchronous: self._log(metrics, step),
                    end_run=self._end)  # fmt: skip

    def _offer(self, monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    def _init(self, id: str | None, **_: Any) -> Any:
        return SimpleNamespace(id=self._begin(id), log=self._log, finish=self._end)

    def _begin(self, id: str | None) -> str:
        self.begun.append(id)
        return id or f"run{len(self.begun)}"

    def _info(self, id: str | None) -> Any:
        return SimpleNamespace(run_id=self._begin(id))

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.asked.set()
        if self.silent:
            self.silent.wait()
        if self.broken:
            raise OSError("no such server")
        self.logged.append((step, metrics))

    def _end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_gets_every_finite_metric_and_goes_on_where_it_was(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics are those of metrics.jsonl under TensorBoard's tags; a resumed run is the same run there."""
    service = StandIn(monkeypatch)
    write(settings(tmp_path, name), range(1, 3), None)
    write(settings(tmp_path, name), range(3, 4), 2)
    lines = read_metrics(tmp_path)
    assert service.logged == [(x["step"], {"reward/reward": x["reward"], "eval/accuracy": 0.5}) for x in lines]
    assert service.begun == [None, "run1"] and service.ended == 2


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_that_fails_is_told_of_once_and_stops_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = StandIn(monkeypatch)
    service.broken = True
    write(settings(tmp_path, name), range(1, 4), None)
    assert len(read_metrics(tmp_path)) == 3
    assert capsys.readouterr().err.count(f"{name} failed and is no longer used: no such server") == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_that_does_not_answer_costs_its_timeout_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It accepts and never answers. No step waits for it, closing waits for the timeout, and one line tells of it."""
    service = StandIn(monkeypatch)
    service.silent = threading.Event()
    logging = trackers.Trackers(settings(tmp_path, name), resume=False, timeout=0.2)
    logging.log(1, {"reward": 1.0})  # the first call hangs
    began = time.monotonic()
    for step in range(2, 1000):
        logging.log(step, {"reward": 1.0})
    assert time.monotonic() - began < 60 and not service.logged
    logging.close()
    service.silent.set()
    assert capsys.readouterr().err.count(f"trackers: {name} failed and is no longer used: ") == 1


def test_a_service_that_hangs_between_steps_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step after the timeout finds it hanging, tells of it, and hands it nothing more; closing does not wait."""
    service, clock = StandIn(monkeypatch), [0.0]
    service.silent = threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    logging = trackers.Trackers(settings(tmp_path, "wandb"), resume=False, timeout=30.0)
    logging.log(1, {})
    assert service.asked.wait(60)
    clock[0] = 31.0
    logging.log(2, {})
    assert "wandb failed and is no longer used: no answer within 30 s" in capsys.readouterr().err
    logging.close()
    service.silent.set()


def test_a_service_that_hangs_at_the_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, answer = StandIn(monkeypatch), threading.Event()
    monkeypatch.setattr(service, "_begin", lambda id: answer.wait())
    with pytest.raises(UserError, match="trackers: wandb gave no answer within 0.1 s"):
        trackers.Trackers(settings(tmp_path, "wandb"), resume=False, timeout=0.1)
    answer.set()


def test_a_service_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackers: mlflow is not installed; pip install 'megarl\[mlflow\]'"):
        trackers.check(["mlflow"])


def test_wandb_itself_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    write(settings(tmp_path, "wandb"), range(1, 3), None)
    write(settings(tmp_path, "wandb"), range(3, 4), 2)
    wandb.teardown()  # ends the process that writes the files
    id = json.loads((tmp_path / trackers.IDS).read_text())["wandb"]
    [one, two] = list((tmp_path / "wandb").glob(f"offline-run-*-{id}*/*.wandb"))  # "-1" for the second of one second
    assert all(b"eval/accuracy" in file.read_bytes() for file in (one, two))


def test_mlflow_itself_holds_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need packages that the client does not
    import mlflow

    mlflow.set_tracking_uri(f"file://{tmp_path}/mlflow")
    write(settings(tmp_path / "run", "mlflow"), range(1, 20), None)  # as fast as it goes: no step may be lost
    write(settings(tmp_path / "run", "mlflow"), range(20, 22), 19)
    id = json.loads((tmp_path / "run" / trackers.IDS).read_text())["mlflow"]
    history = mlflow.MlflowClient().get_metric_history(id, "reward/reward")
    assert [(m.step, m.value) for m in history] == [(step, step / 2) for step in range(1, 22)]
    assert mlflow.get_run(id).data.params["optimizer.clip_grad"] == "1.0"
