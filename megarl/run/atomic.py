"""Checkpoint folders that are complete or absent: written under another name, checksummed, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megarl.errors import RunError, UserError

MANIFEST = "manifest.json"


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def partial_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before its commit."""
    return checkpoints / f".step_{step:06d}.partial"


def prepare(checkpoints: Path, step: int) -> Path:
    """Make an empty partial folder for `step`. Removes what an interrupted save left there."""
    partial = partial_of(checkpoints, step)
    shutil.rmtree(partial, ignore_errors=True)
    with clear_errors(checkpoints):
        partial.mkdir(parents=True)
    return partial


def commit(checkpoints: Path, step: int, keep: int) -> Path:
    """Checksum the partial folder, flush it, rename it, and delete all but the newest `keep` checkpoints."""
    partial, final = partial_of(checkpoints, step), folder_of(checkpoints, step)
    with clear_errors(checkpoints):
        sums = {str(file.relative_to(partial)): _checksum(file) for file in sorted(_files(partial))}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1))
        for file in _files(partial):
            _flush(file)
        _flush(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(checkpoints)
    for old in steps(checkpoints)[:-keep]:
        shutil.rmtree(folder_of(checkpoints, old))
    return final


def discard(checkpoints: Path, step: int) -> None:
    """Remove the partial folder of a failed save of `step`."""
    shutil.rmtree(partial_of(checkpoints, step), ignore_errors=True)


def steps(checkpoints: Path) -> list[int]:
    """The steps of the committed checkpoints, oldest first."""
    return sorted(int(f.name.removeprefix("step_")) for f in checkpoints.glob("step_*") if f.is_dir())


def newest_good(checkpoints: Path, warn: Callable[[str], None]) -> int | None:
    """The newest step whose files match their checksums. Calls `warn(message)` for each newer, damaged one.

    Returns None if there is no checkpoint. Raises UserError if there are some, but all are damaged.
    """
    found = steps(checkpoints)
    for step in reversed(found):
        damage = verify(folder_of(checkpoints, step))
        if damage is None:
            return step
        warn(f"checkpoint of step {step} is damaged ({damage}); falling back to the one before it")
    if found:
        raise UserError(f"checkpoints: none of {len(found)} in {checkpoints} is whole; start without --resume")
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a committed folder; None if nothing is."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or unreadable"
    unknown = {str(file.relative_to(folder)) for file in _files(folder)} - {MANIFEST, *expected}
    if unknown:
        return f"{min(unknown)} is not of this checkpoint"
    for name, checksum in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _checksum(file) != checksum:
            return f"{name} does not match its checksum"
    return None


@contextmanager
def clear_errors(place: Path) -> Iterator[None]:
    """Turn the error of a full or read-only disk into a one-line RunError."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise RunError(f"cannot save to {place}: {os.strerror(e.errno)}; earlier checkpoints are untouched") from e
        raise


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made if absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)
