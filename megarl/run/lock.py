"""One job a run directory, by the kernel's lock on a file in it: it ends when the process that holds it does."""

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
PATIENCE = 120.0  # seconds that a lock of another machine is waited for: NFS gives up a lost node's after 90
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_job(run: Path, say: Callable[[str], None], patience: float = PATIENCE) -> Iterator[None]:
    """Hold the run directory for the body; it is made when absent.

    Raises UserError, naming the holder, while another process of this machine has it, or when one of another machine
    still has it after `patience` seconds; and when the directory cannot be written. A file system without locks is
    told through `say`, and the body runs. A directory that was made here, and that the body left empty (a mistake in
    the data, say), is removed.
    """
    made = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = os.open(run / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UserError(f"run: {run} cannot be written: {e.strerror}") from None
    try:
        _take(file, run, say, time.monotonic() + patience)
        yield
    finally:
        if made and run.is_dir() and [entry.name for entry in run.iterdir()] == [FILE]:
            (run / FILE).unlink()
            run.rmdir()
        os.close(file)  # and with it the lock


def _take(file: int, run: Path, say: Callable[[str], None], until: float) -> None:
    told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(file)
            if _is_alive_here(holder) or time.monotonic() > until:
                raise UserError(f"run: {run} is in use by {_name(holder)}; end it, or name another folder") from None
            if not told:
                say(f"waiting for {run}, in use by {_name(holder)}")
                told = True
            time.sleep(0.2)
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
            say(f"run: {run} is on a file system without locks ({e.strerror}): a second job on it would go unnoticed")
            return
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)


def _holder(file: int) -> dict[str, str | int]:
    """`host` and `pid` of the process that has the lock; {} while it is just taking it."""
    try:
        return json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}


def _is_alive_here(holder: dict[str, str | int]) -> bool:
    return holder.get("host") == socket.gethostname() and psutil.pid_exists(int(holder["pid"]))


def _name(holder: dict[str, str | int]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "another process"
