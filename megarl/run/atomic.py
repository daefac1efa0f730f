"""Files and checkpoint folders that are complete or absent: written under another name, flushed, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from megarl.errors import RunError, UserError

MANIFEST = "manifest.json"
UNLISTED = "common.pt"  # Megatron unpickles such a file wherever it lies, so nobody else may put one into a checkpoint
Warn = Callable[[str], None]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def partial_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before its commit, and where it goes before its files are deleted."""
    return checkpoints / f".step_{step:06d}.partial"


def prepare(checkpoints: Path, step: int) -> Path:
    """Make an empty partial folder for `step`. Removes what an interrupted save left there."""
    partial = partial_of(checkpoints, step)
    with clear_errors(checkpoints):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    return partial


def commit(checkpoints: Path, step: int, keep: int, warn: Warn) -> Path:
    """Checksum the partial folder, flush it and rename it. Then delete all but the newest `keep` checkpoints.

    Copies under another name are neither counted nor deleted. Calls `warn(message)` for an old checkpoint that cannot
    be deleted, and leaves it.
    """
    partial, final = partial_of(checkpoints, step), folder_of(checkpoints, step)
    with clear_errors(checkpoints):
        sums = {str(file.relative_to(partial)): _checksum(file) for file in sorted(_files(partial))}
        (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1))
        for path in partial.rglob("*"):
            flush(path)
        flush(partial)
        _make_way(final, step, warn)
        partial.rename(final)
        flush(checkpoints)
    try:
        saved = [each for each in steps(checkpoints) if each <= step and _step_in(folder_of(checkpoints, each)) == each]
    except (OSError, UserError) as e:
        warn(f"old checkpoints in {checkpoints} are left there: {e}")
        saved = []
    for old in saved[:-keep]:
        _delete(checkpoints, old, warn)
    return final


def _make_way(final: Path, step: int, warn: Warn) -> None:
    """Move away what has the name of a new checkpoint. A damaged one, that the run went back from, is deleted."""
    if not os.path.lexists(final):
        return
    if _step_in(final) == step and not final.is_symlink():
        aside = final.with_name(f".{final.name}.old.partial")
        final.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)  # `clear_partial` tries again
        return
    free = next(name for i in count(1) if not os.path.lexists(name := final.with_name(f"{final.name}.other-{i}")))
    final.rename(free)
    warn(f"{final} was no checkpoint of this run; it is called {free.name} now")


def _delete(checkpoints: Path, step: int, warn: Warn) -> None:
    """Delete a checkpoint, unless it is being read. It disappears at once or stays."""
    folder, aside = folder_of(checkpoints, step), partial_of(checkpoints, step)
    try:
        with _locked(folder, fcntl.LOCK_EX) as free:
            if not free:
                return
            folder.rename(aside)
        shutil.rmtree(aside)
    except OSError as e:
        left = aside if aside.exists() else folder
        warn(f"the old checkpoint {left} cannot be deleted ({e.strerror or e}); it is left there")


def discard(checkpoints: Path, step: int) -> None:
    """Remove the partial folder of a failed save of `step`. Other ranks may still write there."""
    partial = partial_of(checkpoints, step)
    aside = partial.with_name(f".step_{step:06d}.discarded.partial")  # where nobody adds a file while it is deleted
    with suppress(OSError):
        partial.rename(aside)
    for folder in (partial, aside):
        shutil.rmtree(folder, ignore_errors=True)


def clear_partial(checkpoints: Path, warn: Warn) -> None:
    """Remove what interrupted saves and deletions of any step left. Only the job that has the run may call it.

    Calls `warn(message)` for what cannot be removed.
    """
    for partial in sorted(checkpoints.glob(".step_*.partial")) if checkpoints.is_dir() else ():
        try:
            shutil.rmtree(partial)
        except OSError as e:
            warn(f"{partial}, left by an interrupted save, cannot be deleted ({e.strerror or e})")


def steps(checkpoints: Path) -> list[int]:
    """The steps of the committed checkpoints, oldest first. Links, copies and files beside them are none."""
    try:
        found = [(folder, re.fullmatch(r"step_(\d{6,})", folder.name, re.ASCII)) for folder in checkpoints.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"run: {checkpoints} cannot be read: {e.strerror}") from None
    named = ((folder, int(name[1])) for folder, name in found if name)
    return sorted(
        step
        for folder, step in named
        if folder.name == folder_of(checkpoints, step).name and folder.is_dir() and not folder.is_symlink()
    )


def newest_good(checkpoints: Path, warn: Warn) -> int | None:
    """The newest step whose files match their checksums. Calls `warn(message)` for each newer, damaged one.

    Returns None if there is no checkpoint. Raises UserError if there are some, but all are damaged.
    """
    with reading(checkpoints, warn) as step:
        return step


@contextmanager
def reading(checkpoints: Path, warn: Warn) -> Iterator[int | None]:
    """As `newest_good`. In the body no other job deletes that checkpoint, on a file system with locks."""
    damaged: dict[int, str] = {}
    while left := [step for step in steps(checkpoints) if step not in damaged]:
        step, folder = left[-1], folder_of(checkpoints, left[-1])
        with _locked(folder, fcntl.LOCK_SH) as there:
            damage = verify(folder) if there else "it was replaced"
            if damage is None:
                yield step
                return
        if there and folder.is_dir():  # else a newer one has taken its place
            damaged[step] = damage
            warn(f"checkpoint of step {step} is damaged ({damage}); falling back to the one before it")
    if damaged:
        raise UserError(
            f"checkpoints: none of {len(damaged)} in {checkpoints} is whole; delete this folder to start the run from "
            "its beginning with --resume, or name another run folder"
        )
    yield None


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[bool]:
    """Lock a checkpoint's manifest in the body: readers share it, who deletes has it alone and does not wait.

    Yields False if a reader has it, or, to a reader, if the folder has gone. Without locks in the file system, or
    without a manifest, there is nothing to wait for.
    """
    manifest = folder / MANIFEST
    try:
        descriptor = os.open(manifest, os.O_RDONLY if kind == fcntl.LOCK_SH else os.O_RDWR)
    except OSError:
        yield True
        return
    try:
        got = True
        try:
            fcntl.flock(descriptor, kind if kind == fcntl.LOCK_SH else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            got = False
        except OSError:
            pass
        yield got and _names(manifest, descriptor)
    finally:
        os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path is that of the open file still."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def verify(folder: Path) -> str | None:
    """What is wrong with a committed folder; None if nothing is. Files that are not of the checkpoint do not matter."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = {str(name): str(checksum) for name, checksum in manifest["sha256"].items()}
        step = int(manifest["step"])
    except Exception:
        return f"{MANIFEST} is missing or unreadable"
    if folder.name != folder_of(folder.parent, step).name:
        return f"it is a copy of step {step}"
    for file in _files(folder):
        if file.name == UNLISTED and str(file.relative_to(folder)) not in expected:
            return f"{file.relative_to(folder)} is not of this checkpoint"
    for name, checksum in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        try:
            if _checksum(file) != checksum:
                return f"{name} does not match its checksum"
        except OSError as e:
            return f"{name} cannot be read: {e.strerror}"
    return None


def _step_in(folder: Path) -> int | None:
    """The step that a checkpoint's manifest names; None without a readable one."""
    try:
        return int(json.loads((folder / MANIFEST).read_bytes())["step"])
    except Exception:
        return None


@contextmanager
def clear_errors(place: Path, consequence: str = "; earlier checkpoints are untouched") -> Iterator[None]:
    """Turn an error of the disk into a one-line RunError that names the file, or `place` where the error does not."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise  # of another rank, not of the disk
    except OSError as e:
        where = e.filename if isinstance(e.filename, str | Path) else place
        raise RunError(f"cannot save to {where}: {e.strerror or e}{consequence}") from e
    except Exception as e:
        if found := re.search(r"(?:os error|code:) (\d+)", str(e)):  # safetensors' own error type is not public
            raise RunError(f"cannot save to {place}: {os.strerror(int(found[1]))}{consequence}") from e
        raise


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str | Iterable[str]) -> None:
    """Write a file, whole or not at all, and flush it; its folder is made if absent. RunError if the disk fails."""
    partial = file.with_name(file.name + ".partial")
    try:
        with clear_errors(file, consequence=""):
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as out:
                out.writelines([text] if isinstance(text, str) else text)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(file)
            flush(file.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


class Appender:
    """Adds lines to a file, each whole or not at all. Unbuffered: a full disk leaves nothing to write at the end."""

    def __init__(self, file: Path) -> None:
        self.path = file
        with clear_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = file.open("ab", buffering=0)
        if self._stream.tell() and not file.read_bytes().endswith(b"\n"):
            self.append("")  # ends a line that a crash cut off

    def append(self, line: str) -> None:
        rest = memoryview((line + "\n").encode())
        with clear_errors(self.path):
            before = os.fstat(self._stream.fileno()).st_size
            try:
                while rest:
                    rest = rest[self._stream.write(rest) or 0 :]
            except OSError:
                with suppress(OSError):
                    self._stream.truncate(before)
                raise

    def flush(self) -> None:
        """Have every line on the disk itself before returning."""
        with clear_errors(self.path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        with suppress(OSError):  # no line is pending
            self._stream.close()
