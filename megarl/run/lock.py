"""One job per run directory: a kernel lock on a file in it, which ends with the process that took it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megarl.errors import UserError

FILE = ".lock"
REMOTE_TIMEOUT = 120.0  # seconds to wait for a lock of another machine: NFS drops a lost node's lock after 90
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_job(run: Path, warn: Callable[[str], None], remote_timeout: float = REMOTE_TIMEOUT) -> Iterator[None]:
    """Lock the run directory, which is created if absent, while the body runs.

    Raises UserError, naming the owner, if another process of this machine has the lock, or a process of another machine
    still has it after `remote_timeout` seconds. Raises UserError too if the directory cannot be written. On a file
    system without locks, calls `warn` and runs the body. Removes a directory that was created here and that the body
    left empty, for example after an error in the data.
    """
    created = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = os.open(run / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UserError(f"run: {run} cannot be written: {e.strerror}") from None
    try:
        _acquire(file, run, warn, time.monotonic() + remote_timeout)
        yield
    finally:
        if created and run.is_dir() and [entry.name for entry in run.iterdir()] == [FILE]:
            (run / FILE).unlink()
            run.rmdir()
        os.close(file)  # releases the lock


def _acquire(file: int, run: Path, warn: Callable[[str], None], until: float) -> None:
    warned = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            owner = _owner(file)
            name = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
            alive_here = owner.get("host") == socket.gethostname() and psutil.pid_exists(int(owner["pid"]))
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
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)


def _owner(file: int) -> dict[str, str | int]:
    """`host` and `pid` of the process that has the lock. Empty if it has not written them yet."""
    try:
        return json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
