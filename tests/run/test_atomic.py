"""Checkpoint folders: whole or absent, checked before use."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import RunError, UserError
from megarl.run import atomic
from tests.support.disks import limited_files


def save(folder: Path, step: int, keep: int = 2, warn: Callable[[str], object] = pytest.fail) -> Path:
    partial = atomic.prepare(folder, step)
    (partial / "learner").mkdir()
    (partial / "learner" / "weights").write_bytes(os.urandom(64))
    (partial / "state.json").write_text(f'{{"step": {step}}}')
    return atomic.commit(folder, step, keep, warn)


def test_nothing_is_visible_before_commit(tmp_path: Path) -> None:
    partial = atomic.prepare(tmp_path, 1)
    (partial / "weights").write_bytes(b"x")
    assert atomic.steps(tmp_path) == []
    assert atomic.newest_good(tmp_path, print) is None


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert atomic.steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no object", "foreign pickle"])
def test_damaged_checkpoint_falls_back(tmp_path: Path, damage: str) -> None:
    """A flipped byte, a cut or missing file, no manifest, a pickle that Megatron would read: the one before is taken,
    with a message."""
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "learner" / "weights"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no object":
        (atomic.folder_of(tmp_path, 2) / atomic.MANIFEST).write_text("[]")
    elif damage == "foreign pickle":
        weights.with_name("common.pt").write_bytes(b"nobody checksummed this")
    else:
        (atomic.folder_of(tmp_path, 2) / atomic.MANIFEST).unlink()
    said: list[str] = []
    assert atomic.newest_good(tmp_path, said.append) == 1
    assert len(said) == 1 and "step 2" in said[0]


def test_no_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    (save(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(UserError, match="none of 1.*delete this folder to start the run from its beginning with --res"):
        atomic.newest_good(tmp_path, lambda message: None)


def test_an_interrupted_save_is_forgotten(tmp_path: Path) -> None:
    """What a killed save left is neither seen nor in the way of the next."""
    save(tmp_path, 1)
    (atomic.prepare(tmp_path, 2) / "half").write_bytes(b"x")
    assert atomic.newest_good(tmp_path, print) == 1
    assert not (save(tmp_path, 2) / "half").exists()


def test_names_beside_the_checkpoints_are_none(tmp_path: Path) -> None:
    """Links, copies, converted folders and files: neither read, counted nor deleted, and no error."""
    save(tmp_path, 3)
    copies = (
        "step_000003.bak",
        "step_000003-hf",
        "step_best.d",
        "step_",
        "step_3",
        "step_000003 (copy)",
        "step_０００００9",
    )
    for name in copies:
        shutil.copytree(tmp_path / "step_000003", tmp_path / name)
    (tmp_path / "step_best").symlink_to("step_000003")
    (tmp_path / "step_000009").symlink_to("step_000003")
    (tmp_path / "step_000008").write_text("a file")
    (tmp_path / ".DS_Store").write_text("")
    assert atomic.steps(tmp_path) == [3]
    save(tmp_path, 4, keep=1)
    assert atomic.steps(tmp_path) == [4]
    assert {path.name for path in tmp_path.iterdir()} == {
        *copies, "step_000004", "step_best", "step_000009", "step_000008", ".DS_Store"
    }  # fmt: skip


def test_a_copy_under_the_name_of_another_step_is_neither_taken_nor_deleted(tmp_path: Path) -> None:
    """`cp -r step_000002 step_000009`: the copy does not push out the newest, and makes way when step 9 is saved."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    shutil.copytree(atomic.folder_of(tmp_path, 2), atomic.folder_of(tmp_path, 9))
    said: list[str] = []
    assert atomic.newest_good(tmp_path, said.append) == 2 and "copy of step 2" in said[0]
    save(tmp_path, 3, keep=1)
    assert atomic.steps(tmp_path) == [3, 9]
    save(tmp_path, 9, keep=1, warn=said.append)
    assert atomic.newest_good(tmp_path, pytest.fail) == 9 and "step_000009.other-1" in said[-1]


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "learner/.nfs0000001", "learner/old/weights"])
def test_files_that_are_not_of_a_checkpoint_do_not_matter(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 1) / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert atomic.newest_good(tmp_path, pytest.fail) == 1


def test_what_interrupted_saves_left_is_cleared(tmp_path: Path) -> None:
    """Of any step. What cannot be deleted is told of."""
    save(tmp_path, 1)
    for step in (2, 3, 7):
        (atomic.prepare(tmp_path, step) / "half").write_bytes(b"x")
    atomic.clear_partial(tmp_path, pytest.fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    (tmp_path / ".step_000009.partial").write_text("a file")
    said: list[str] = []
    atomic.clear_partial(tmp_path, said.append)
    assert len(said) == 1 and ".step_000009.partial" in said[0]
    atomic.clear_partial(tmp_path / "absent", pytest.fail)


@pytest.mark.parametrize("cause", [errno.ENOTEMPTY, errno.EPERM, errno.ESTALE, errno.EBUSY])
@pytest.mark.parametrize("call", ["rmtree", "rename"])
def test_an_old_checkpoint_that_cannot_be_deleted_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: int, call: str
) -> None:
    """NFS's "Directory not empty", for example: the new one is committed, and the run goes on."""
    save(tmp_path, 1)
    original = {"rmtree": shutil.rmtree, "rename": Path.rename}[call]

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if "000001" in path.name:
            raise OSError(cause, os.strerror(cause), str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(*((shutil, "rmtree") if call == "rmtree" else (Path, "rename")), refuse)
    said: list[str] = []
    save(tmp_path, 2, keep=1, warn=said.append)
    assert len(said) == 1 and "cannot be deleted" in said[0] and os.strerror(cause) in said[0]
    assert atomic.newest_good(tmp_path, pytest.fail) == 2


def test_a_checkpoint_that_is_read_is_not_deleted(tmp_path: Path) -> None:
    """`megarl eval RUN` beside a run that keeps one: the next save after the reader deletes it."""
    save(tmp_path, 1, keep=1)
    with atomic.reading(tmp_path, pytest.fail) as step:
        assert step == 1
        save(tmp_path, 2, keep=1)
        assert atomic.verify(atomic.folder_of(tmp_path, 1)) is None
    save(tmp_path, 3, keep=1)
    assert atomic.steps(tmp_path) == [3]


def test_a_reader_whose_checkpoint_goes_takes_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run deletes it between the look at the folder and the lock."""
    save(tmp_path, 1, keep=1)
    looks: list[int] = []
    original = atomic.steps

    def steps(checkpoints: Path) -> list[int]:
        found = original(checkpoints)
        if not looks:
            looks.append(1)
            save(tmp_path, 2, keep=1)
        return found

    monkeypatch.setattr(atomic, "steps", steps)
    with atomic.reading(tmp_path, pytest.fail) as step:
        assert step == 2


def test_every_file_and_folder_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss after the commit finds the whole checkpoint. Shown by the order of calls, not by a power loss."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(Path, "rename", lambda path, to: calls.append("rename") or rename(path, to))
    save(tmp_path, 1)
    names = ("", "/manifest.json", "/state.json", "/learner", "/learner/weights")
    assert {f"{atomic.partial_of(tmp_path, 1)}{name}" for name in names} <= set(calls[: calls.index("rename")])
    assert str(tmp_path) in calls[calls.index("rename") :]


def test_a_text_is_written_whole_and_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append("replace") or replace(path, to))
    atomic.write_text(tmp_path / "config.yaml", "steps: 1")
    assert calls == [str(tmp_path / "config.yaml.partial"), "replace", str(tmp_path)]


def test_lines_are_whole_or_absent_on_a_full_disk(tmp_path: Path) -> None:
    """The file is named, nothing of the line is left, and the end of the file's use fails no more."""
    file = tmp_path / "metrics.jsonl"
    lines = atomic.Appender(file)
    lines.append("x" * 50)
    with limited_files(70):
        with pytest.raises(RunError, match=f"cannot save to {file}: File too large"):
            lines.append("y" * 50)
        lines.close()
    assert file.read_text() == "x" * 50 + "\n"


@pytest.mark.parametrize("cause", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE, errno.EIO])
def test_full_or_read_only_disk_is_one_line(tmp_path: Path, cause: int) -> None:
    """Played by the error that it gives; tests/loop/test_checkpoints.py fills one."""
    words = f"cannot save to .*{os.strerror(cause)}; earlier checkpoints are untouched"
    with pytest.raises(RunError, match=words) as failure, atomic.clear_errors(tmp_path):
        raise OSError(cause, os.strerror(cause))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("error", [ConnectionResetError("rank 1 left"), TimeoutError("waited"), ValueError("no file")])
def test_errors_of_other_ranks_pass_as_they_are(tmp_path: Path, error: Exception) -> None:
    """They are operating system errors too, but not of the disk."""
    with pytest.raises(type(error)), atomic.clear_errors(tmp_path):
        raise error
