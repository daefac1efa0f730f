"""One job per run directory: a kernel lock on a file in it, which ends with the process that took it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megarl.errors import UserError
from megarl.run.atomic import clear_errors
from megarl.run.records import recorded

FILE = ".lock"
LOGS = "logs"
REMOTE_TIMEOUT = 120.0  # seconds to wait for a lock of another machine: NFS drops a lost node's lock after 90
FOLDER_TIMEOUT = 2.0  # seconds: a process that ends frees its two locks one after the other
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_job(run: Path, warn: Callable[[str], None], remote_timeout: float = REMOTE_TIMEOUT) -> Iterator[None]:
    """Lock the run directory, which is created if absent, while the body runs.

    Raises UserError, naming the owner, if another process of this machine has the lock, or a process of another machine
    still has it after `remote_timeout` seconds. Raises UserError too if the directory cannot be written. On a file
    system without locks, calls `warn` and runs the body. Removes a directory that was new or empty when the body ends
    before it has recorded anything, for example by an error in the data; logs that say something stay.
    """
    try:
        new = not run.exists() or {entry.name for entry in run.iterdir()} <= {FILE, LOGS}
        run.mkdir(parents=True, exist_ok=True)
        file = os.open(run / FILE, os.O_RDWR | os.O_CREAT, 0o644)
        folder = os.open(run, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"run: {run} cannot be written: {e.strerror}") from None
    ours = False
    try:
        _acquire(file, run, warn, time.monotonic() + remote_timeout)
        _acquire_folder(folder, run)
        ours = True
        with clear_errors(run / FILE, consequence=""):
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        if ours and new and run.is_dir() and not recorded(run):
            _remove(run)
        for descriptor in (file, folder):
            os.close(descriptor)  # releases the lock


def _acquire(file: int, run: Path, warn: Callable[[str], None], until: float) -> None:
    warned = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = _owner(file)
            name = "process {1} on {0}".format(*owner) if owner else "another process"
            alive_here = owner is not None and owner[0] == socket.gethostname() and psutil.pid_exists(owner[1])
            if alive_here or time.monotonic() > until:
                raise UserError(f"run: {run} is in use by {name}; end it, or name another folder") from None
            if not warned:
                warn(f"waiting for {run}, in use by {name}")
                warned = True
            time.sleep(0.2)
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
            warn(f"run: {run} is on a file system without locks ({e.strerror}): a second job would go unnoticed")
            return


def _acquire_folder(folder: int, run: Path) -> None:
    """Lock the directory itself too, where the file system can: somebody may delete the file."""
    until = time.monotonic() + FOLDER_TIMEOUT
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise UserError(f"run: {run} is in use by another process; end it, or name another folder") from None
            time.sleep(0.05)
        except OSError:
            return  # the file's lock decides


def _owner(file: int) -> tuple[str, int] | None:
    """Host and process id of who has the lock. None if it has not written them yet, or somebody else wrote there."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return str(found["host"]), int(found["pid"])
    except Exception:
        return None


def _remove(run: Path) -> None:
    """Delete a run directory without its logs, unless they are empty."""
    for entry in list(run.iterdir()):
        if entry.name == LOGS and any(file.is_file() and file.stat().st_size for file in entry.rglob("*")):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()
    with suppress(OSError):
        run.rmdir()
