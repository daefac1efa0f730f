"""A run's checkpoints on a disk that fails: what was there stays, what was begun is removed, one line says why."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl import commit, config
from megarl.checkpoints import Checkpoints
from megarl.errors import RunError
from megarl.progress import RunProgress

SIZE = 100_000  # bytes of the learner's part


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """No file of this process grows over `size` bytes: how a full disk looks to who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def checkpoints(run: Path) -> Checkpoints:
    """Of one rank, whose learner and controller write a file each."""
    settings = config.parse({"run": run, "model": {"path": "m"}, "data": {"train": ["t"]}})
    world: Any = SimpleNamespace(is_controller=True, deadline_s=60.0, barrier=lambda name: None)
    learner: Any = SimpleNamespace(save=lambda folder: (folder / "weights").write_bytes(bytes(SIZE)))
    controller: Any = SimpleNamespace(save=lambda folder: (folder / "data").write_bytes(b"position"))
    return Checkpoints(settings, world, learner, controller, RunProgress(1, quiet=True))


def test_a_disk_that_fills_amid_a_save_keeps_what_was_there(tmp_path: Path) -> None:
    """Then, with room again, the next save succeeds."""
    mine = checkpoints(tmp_path)
    mine.save(1)
    with limited_files(SIZE // 2), pytest.raises(RunError, match="cannot save.*earlier checkpoints are untouched"):
        mine.save(2)
    assert [file.name for file in mine.folder.iterdir()] == ["step_000001"]
    assert commit.newest_good(mine.folder, pytest.fail) == 1
    mine.save(2)
    assert commit.newest_good(mine.folder, pytest.fail) == 2


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path: Path) -> None:
    """The controller's own few bytes do not fit either."""
    with limited_files(0), pytest.raises(RunError, match="cannot save") as failure:
        checkpoints(tmp_path).save(1)
    assert "\n" not in str(failure.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []
