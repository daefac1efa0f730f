"""What a run prints outlives its reader: when `megarl train … | head` has read enough, the rest goes to a file."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO)  # the pipe's reader ended; the terminal was closed
FILE = "output.txt"


class _Lasting(io.RawIOBase):
    """Writes to a file descriptor, and lets that name the file `spare` once its reader is gone."""

    def __init__(self, descriptor: int, spare: Path) -> None:
        self._descriptor, self._spare = descriptor, spare

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        try:
            return os.write(self._descriptor, data)  # type: ignore[arg-type]
        except OSError as e:
            if e.errno not in GONE:
                raise
        self._replace()
        return os.write(self._descriptor, data)  # type: ignore[arg-type]

    def _replace(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            self._spare.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._spare, flags, 0o644)
        except OSError:  # a run must not end for its output
            file = os.open(os.devnull, flags)
        os.dup2(file, self._descriptor)
        os.close(file)


def outlive_reader(logs: Path) -> None:
    """Have standard output and error go on in `logs`/output.txt, as soon as nobody reads them any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # not a notebook's or a test's
            setattr(sys, name, _lasting(stream, logs / FILE))


@contextmanager
def lasting(logs: Path) -> Iterator[None]:
    """As `outlive_reader`, during the body."""
    before = sys.stdout, sys.stderr
    outlive_reader(logs)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO, spare: Path) -> TextIO:
    stream.flush()
    raw = io.BufferedWriter(_Lasting(stream.fileno(), spare))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True)
