"""Tensors as torch.save writes them, anywhere in a file: described one by one, written while they are read.

torch.save's archive is a zip file: records that describe the tensor, one record with its bytes, a directory. Everything
but the bytes depends only on type and shape, so torch.save makes it once for each type and shape.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.models.files.tensor_io import describe, pwrite, write

ALIGNMENT = 64  # bytes, of an archive in its file; the tensor's bytes are aligned like this in the archive
OVERHEAD = 2048  # maximum bytes of an archive beside the tensor's


class Frame(NamedTuple):
    """An archive without the tensor's bytes."""

    head: bytes
    tail: bytes


class ArchiveWriter:
    """Writes archives from several threads. `scratch`: a folder on a file system with sparse files."""

    def __init__(self, scratch: Path) -> None:
        self._template = scratch / "archive"
        self._frames: dict[tuple[torch.dtype, tuple[int, ...]], Frame] = {}
        self._lock = Lock()

    def write(self, fd: int, start: int, shape: tuple[int, ...], blocks: Iterable[Tensor]) -> int:
        """Write a tensor of `shape`, the concatenated `blocks`, at byte `start`; return where it ends."""
        first, *rest = blocks
        frame = self._frame(first.dtype, shape)
        end = pwrite(fd, memoryview(frame.head), start)
        for block in (first, *rest):
            end = write(fd, block, end)
        return pwrite(fd, memoryview(frame.tail), end)

    def _frame(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
        with self._lock:
            if (dtype, shape) not in self._frames:
                tensor = torch.empty(shape, dtype=dtype)  # never touched, so it takes no memory
                with torch.serialization.skip_data():
                    torch.save(tensor, self._template)
                with open(self._template, "rb") as file:
                    start = data_start(described(file))
                    head = os.pread(file.fileno(), start, 0)
                    tail = os.pread(file.fileno(), OVERHEAD, start + tensor.nbytes)
                self._template.unlink()
                self._frames[dtype, shape] = Frame(head, tail)
            return self._frames[dtype, shape]


def read_archive(path: Path, start: int, length: int) -> Tensor:
    """Describe the tensor of the archive in bytes [start, start + length). UserError when it is damaged."""
    try:
        with open(path, "rb", buffering=0) as file:
            tensor = described(io.BufferedReader(_Window(file, start, length)))
    except (RuntimeError, pickle.UnpicklingError, EOFError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"{path}: damaged at byte {start} ({reason})") from None
    return placed(tensor, path, start)


def described(archive: Any, **options: Any) -> Any:
    """What torch.save wrote, with tensors on the meta device: their bytes are not read. Raises torch.load's errors."""
    return torch.load(archive, map_location="meta", weights_only=True, **options)


def data_start(tensor: Tensor) -> int:
    """The byte of the archive where the storage of a `described` tensor begins."""
    offset = tensor.untyped_storage()._checkpoint_offset
    assert offset is not None  # torch.load sets it
    return offset


def placed(tensor: Tensor, path: Path, start: int = 0) -> Tensor:
    """A `described` tensor with its place: the archive at byte `start` of a file."""
    return describe(tensor, path, start + data_start(tensor))


class _Window(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self.seek(0)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = self.tell() if whence == io.SEEK_CUR else self._length if whence == io.SEEK_END else 0
        return self._file.seek(self._start + base + offset) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        return self._file.readinto(view[: max(0, self._length - self.tell())]) or 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
