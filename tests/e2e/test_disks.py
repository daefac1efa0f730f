"""Disks that fill, and run folders that vanish: one line that names the file, exit code 1, and nothing half is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megarl import config, launch
from megarl.errors import RunError, UserError
from megarl.run import atomic, room
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support import runs
from tests.support.disks import small_disk

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]


def settings(run: Path, *more: str) -> config.Settings:
    return runs.settings(run, "parallel.tp=2", "steps=3", "checkpoint={every: 1, keep: 1}", *more)


@pytest.mark.parametrize("kib", [4, 24, 48, 64, 72, 80, 300, 800])
def test_a_full_disk_is_one_line_with_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kib: int
) -> None:
    """At the lock, settings, metrics, TensorBoard, in Python and C++ parts of a checkpoint, in the report.

    The check before the start is off, as if others had filled the disk since.
    """
    monkeypatch.setattr(room, "needed", lambda *_: 0)
    with small_disk(tmp_path / "disk", kib) as disk:
        with pytest.raises(RunError) as failure:
            launch.train(settings(disk / "run"))
        said, err = str(failure.value), capfd.readouterr().err
        assert str(disk) in said and "\n" not in said
        assert "disk is full" in said or "No space left" in said
        assert "Traceback" not in err and err.count("was not written") <= 1
        assert not list(disk.rglob(".step_*.partial"))


def train_and_delete(wanted: config.Settings) -> None:
    """The run's folder is deleted after its first step."""
    from megarl.loop.controller import Controller

    original = Controller.finish_step

    def finish_step(self: Controller, step: int, *arguments: object) -> None:
        original(self, step, *arguments)
        shutil.rmtree(self.settings.run)

    Controller.finish_step = finish_step
    train(wanted)


def test_a_run_folder_deleted_amid_the_run_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunError, match=f"cannot save to {run}") as failure:
        spawn(train_and_delete, 1, (settings(run, "parallel.tp=1", "checkpoint.every=0"),), runs.DEADLINE)
    assert "\n" not in str(failure.value)


def test_checkpoints_being_a_file_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match=f"run: {run / 'checkpoints'} is a file"):
        launch.train(settings(run))


def test_advice_does_not_go_in_a_circle(tmp_path: Path) -> None:
    """A start that fails, then the same command; all checkpoints damaged, then what the message says."""
    run = tmp_path / "run"
    wanted = settings(run, "parallel.tp=1", "steps=1")
    broken = settings(run, "parallel.tp=1", "steps=1", "rollout.canary_limit=1e-12")
    with pytest.raises(RunError):
        launch.train(broken)
    assert not run.exists()
    launch.train(wanted)
    folder = atomic.folder_of(run / "checkpoints", 1)
    (folder / atomic.MANIFEST).write_text("")
    with pytest.raises(UserError, match="delete this folder to start the run from its beginning with --resume"):
        launch.train(wanted, resume=True)
    shutil.rmtree(run / "checkpoints")
    assert [line["step"] for line in launch.train(wanted, resume=True)] == [1]
