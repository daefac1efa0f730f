"""Ends the processes that a grader has started, whatever sessions, groups and parents they have by now."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil

TAG = "MEGARL_GRADER"  # environment variable: which grader a process descends from
PATIENCE = 5.0  # seconds for killed processes to be gone; one that waits for a dead disk may never be


def end_descendants(process: int) -> bool:
    """Kill every descendant of `process`, and wait until none runs. Returns whether there was one."""

    def found() -> Iterable[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(process).children(recursive=True)
        return []

    return _end(found, {os.getpgrp(), _group(process)})


def end_tagged(tag: str) -> None:
    """The same for every process of ours whose environment has `tag`: it is found without its ancestors."""

    def found() -> Iterable[psutil.Process]:
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if each.pid != os.getpid() and each.environ().get(TAG) == tag:
                    yield each

    _end(found, {os.getpgrp()})


def _end(found: Callable[[], Iterable[psutil.Process]], spared: set[int]) -> bool:
    """Kill what is found, again and again: between two looks a process may have started others."""
    until, any_found = time.monotonic() + PATIENCE, False
    while running := [each for each in found() if _runs(each)]:
        any_found = True
        for each in running:
            group = _group(each.pid)
            with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
                if group in spared:
                    each.kill()
                else:  # a whole group at once: none of it can start another meanwhile
                    os.killpg(group, signal.SIGKILL)
        if time.monotonic() > until:
            break
        psutil.wait_procs(running, timeout=0.05)
    return any_found


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _group(process: int) -> int:
    try:
        return os.getpgid(process)
    except ProcessLookupError:
        return os.getpgrp()
