"""A run's checkpoints on a disk that fails: old ones stay, the new one is removed, one line says why."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl import config
from megarl.errors import RunError
from megarl.learner import checkpoint
from megarl.loop.checkpoints import Checkpoints
from megarl.run import atomic
from megarl.view.progress import RunProgress
from tests.support.disks import limited_files

SIZE = 100_000  # bytes of the learner's part


@pytest.fixture(autouse=True)
def small_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's part is what its `write` makes of the folder."""
    monkeypatch.setattr(checkpoint, "saving", lambda learner, folder, aside: lambda: learner.write(folder))


def _weights(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes(SIZE))


def checkpoints(run: Path, write: Callable[[Path], object] = _weights, asynchronous: bool = False) -> Checkpoints:
    """Of one rank, whose learner and controller write a file each."""
    tree = {"run": run, "model": {"path": "m"}, "data": {"train": ["t"]}, "checkpoint": {"asynchronous": asynchronous}}
    settings = config.parse(tree)
    world: Any = SimpleNamespace(is_controller=True, deadline_s=60.0, barrier=lambda name: None)
    world.aside = lambda: world
    learner: Any = SimpleNamespace(write=write)
    controller: Any = SimpleNamespace(save=lambda folder: (folder / "data").write_bytes(b"position"))
    return Checkpoints(settings, world, learner, controller, RunProgress(1, quiet=True))


def test_a_disk_that_fills_amid_a_save_keeps_what_was_there(tmp_path: Path) -> None:
    """Then, with room again, the next save succeeds."""
    mine = checkpoints(tmp_path)
    mine.save(1)
    with limited_files(SIZE // 2), pytest.raises(RunError, match="cannot save.*earlier checkpoints are untouched"):
        mine.save(2)
    assert [file.name for file in mine.folder.iterdir()] == ["step_000001"]
    assert atomic.newest_good(mine.folder, pytest.fail) == 1
    mine.save(2)
    assert atomic.newest_good(mine.folder, pytest.fail) == 2


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path: Path) -> None:
    """The controller's own few bytes do not fit either."""
    with limited_files(0), pytest.raises(RunError, match="cannot save") as failure:
        checkpoints(tmp_path).save(1)
    assert "\n" not in str(failure.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_asynchronous_save_is_written_beside_training(tmp_path: Path) -> None:
    """`save` returns while the disk is at work; the next one, and the end of the run, wait for it."""
    disk_is_done = threading.Event()

    def slowly(folder: Path) -> None:
        assert disk_is_done.wait(60)
        _weights(folder)

    with checkpoints(tmp_path, slowly, asynchronous=True) as mine:
        mine.save(1)
        assert atomic.steps(mine.folder) == []
        disk_is_done.set()
        mine.save(2)
        assert atomic.steps(mine.folder)[0] == 1
    assert atomic.steps(mine.folder) == [1, 2]
    assert atomic.newest_good(mine.folder, pytest.fail) == 2


def test_an_asynchronous_save_that_fails_is_told_by_the_next(tmp_path: Path) -> None:
    def on_a_full_disk(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mine = checkpoints(tmp_path, on_a_full_disk, asynchronous=True)
    mine.save(1)
    with pytest.raises(RunError, match="cannot save.*No space left"):
        mine.save(2)
    mine.finish()
    assert list(mine.folder.iterdir()) == []
