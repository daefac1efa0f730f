"""Checkpoint folders: whole or absent, checked before use."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megarl.errors import RunError, UserError
from megarl.run import atomic


def save(folder: Path, step: int, keep: int = 2) -> Path:
    partial = atomic.prepare(folder, step)
    (partial / "learner").mkdir()
    (partial / "learner" / "weights").write_bytes(os.urandom(64))
    (partial / "state.json").write_text(f'{{"step": {step}}}')
    return atomic.commit(folder, step, keep)


def test_nothing_is_visible_before_commit(tmp_path: Path) -> None:
    partial = atomic.prepare(tmp_path, 1)
    (partial / "weights").write_bytes(b"x")
    assert atomic.steps(tmp_path) == []
    assert atomic.newest_good(tmp_path, print) is None


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert atomic.steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "foreign file"])
def test_damaged_checkpoint_falls_back(tmp_path: Path, damage: str) -> None:
    """A flipped byte, a cut, missing or foreign file, no manifest: the one before is taken, with a message."""
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "learner" / "weights"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "foreign file":
        weights.with_name("common.pt").write_bytes(b"nobody checksummed this")
    else:
        (atomic.folder_of(tmp_path, 2) / atomic.MANIFEST).unlink()
    said: list[str] = []
    assert atomic.newest_good(tmp_path, said.append) == 1
    assert len(said) == 1 and "step 2" in said[0]


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match="none of 1"):
        atomic.newest_good(tmp_path, lambda message: None)


def test_an_interrupted_save_is_forgotten(tmp_path: Path) -> None:
    """What a killed save left is neither seen nor in the way of the next."""
    save(tmp_path, 1)
    (atomic.prepare(tmp_path, 2) / "half").write_bytes(b"x")
    assert atomic.newest_good(tmp_path, print) == 1
    assert not (save(tmp_path, 2) / "half").exists()


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_full_or_read_only_disk_is_one_line(tmp_path: Path, cause: int) -> None:
    """Played by the error that it gives; tests/loop/test_checkpoints.py fills one."""
    words = f"cannot save to .*{os.strerror(cause)}; earlier checkpoints are untouched"
    with pytest.raises(RunError, match=words) as failure, atomic.clear_errors(tmp_path):
        raise OSError(cause, os.strerror(cause))
    assert "\n" not in str(failure.value)


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="interrupted"), atomic.clear_errors(tmp_path):
        raise OSError(errno.EINTR, "interrupted")
