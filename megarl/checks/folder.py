"""The run's folder: free, writable, and with room for its checkpoints."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from megarl.config import Settings
from megarl.errors import UserError
from megarl.models.shape import ModelShape
from megarl.run import room
from megarl.run.records import recorded

GIB = 2**30


def check(settings: Settings, shape: ModelShape, resume: bool) -> str:
    """The room in words. Raises UserError; leaves nothing behind."""
    run = settings.run
    checkpoints = run / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"run: {checkpoints} is a file; move it away, or name another folder")
    if not resume and recorded(run):
        raise UserError(f"run: {run} already has a run; add --resume to continue it, or name another folder")
    there = _writable(run)
    needed, free = room.needed(settings, shape.parameters(), resume), shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"run: {run}: its checkpoints need {needed / GIB:.1f} GiB, and {free / GIB:.1f} are free; set a lower "
            "checkpoint.keep, checkpoint.optimizer: false, or another folder"
        )
    return f"{needed / GIB:.2f} GiB for checkpoints, {free / GIB:.1f} free"


def _writable(run: Path) -> Path:
    """The nearest folder above `run` that exists, or `run` itself."""
    there = next(place for place in (run.absolute(), *run.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        raise UserError(f"run: {run} cannot be made: {there} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"x")
    except OSError as e:
        raise UserError(f"run: {run} cannot be written: {there}: {e.strerror}") from None
    return there
