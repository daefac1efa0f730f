"""Tensors that stay in their files: described by their place, read a band of rows at a time, written in any order.

A description is a tensor on the meta device whose storage knows its place in a file. Views of it are descriptions too.
So a map can slice and reorder a checkpoint before any byte is read. `bands` reads one through a buffer that fits in a
processor's cache. Mapping files into memory would cost more than the copy: page faults that wait for the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megarl.errors import UserError

BAND = 2**20  # bytes read at a time; a row at least
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Place(NamedTuple):
    """Where a storage's first byte is."""

    path: Path
    start: int


def describe(tensor: Tensor, path: Path, start: int) -> Tensor:
    """Make a meta tensor the description of a file's bytes, its storage beginning at byte `start`."""
    tensor.untyped_storage().place = Place(path, start)  # type: ignore[attr-defined]
    return tensor


@dataclass(frozen=True, slots=True)
class Joined:
    """`torch.cat(blocks, dim)` of descriptions: rows (dim 0) or columns (dim 1) from different places."""

    blocks: Sequence[Tensor]
    dim: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].dtype


Values = Tensor | Joined


def bands(values: Values, rows: int | None = None) -> Iterator[Tensor]:
    """The rows of `values` in order, `rows` at a time. Default: about `BAND` bytes of a file, or all rows in memory.

    A scalar is a row of one value. The next band from a file overwrites the one before. UserError when a file ends
    inside a tensor.
    """
    if isinstance(values, Tensor):
        yield from _bands_of_one(values if values.dim() else values[None], rows)
    elif values.dim == 0:
        for block in values.blocks:
            yield from bands(block, rows)
    else:
        rows = rows or max(1, BAND // sum(block[0].nbytes for block in values.blocks))
        for columns in zip(*(bands(block, rows) for block in values.blocks), strict=True):
            yield torch.from_numpy(np.concatenate([_array(column) for column in columns], 1)).view(values.dtype)


def _bands_of_one(tensor: Tensor, rows: int | None) -> Iterator[Tensor]:
    if not tensor.is_meta:
        yield from tensor.split(rows) if rows else [tensor]
        return
    if tensor.numel() == 0:
        return
    place: Place = tensor.untyped_storage().place  # type: ignore[attr-defined]
    size, length, stride = tensor.dtype.itemsize, len(tensor), tensor.stride(0)
    row = 1 + sum((n - 1) * step for n, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
    if rows is None:  # a transposed tensor's rows overlap
        rows = length if stride < row else max(1, BAND // (stride * size))
    buffer = torch.empty((min(rows, length) - 1) * stride + row, dtype=tensor.dtype)
    data = tensor_bytes(buffer)
    start = place.start + int(tensor.storage_offset()) * size
    fd = os.open(place.path, os.O_RDONLY)
    try:
        for first in range(0, length, rows):
            count = min(rows, length - first)
            _pread(fd, data[: ((count - 1) * stride + row) * size], start + first * stride * size, place.path)
            yield buffer.as_strided((count, *tensor.shape[1:]), tensor.stride())
    finally:
        os.close(fd)


def read(tensor: Tensor, into: Tensor) -> None:
    """Copy a tensor's values (from its file if it is a description) to another tensor of its shape."""
    rows, first = _array(into if into.dim() else into[None]), 0
    for band in bands(tensor):
        rows[first : first + len(band)] = _array(band)
        first += len(band)


def loaded(values: Values) -> Tensor:
    """The tensor, in memory."""
    if isinstance(values, Joined):
        return torch.cat([loaded(block) for block in values.blocks], values.dim)
    if not values.is_meta:
        return values
    tensor = torch.empty(values.shape, dtype=values.dtype)
    read(values, tensor)
    return tensor


def in_one_piece(values: Values) -> Tensor:
    """A tensor or description that allows views."""
    return loaded(values) if isinstance(values, Joined) else values


def write(fd: int, values: Values, offset: int) -> int:
    """Write `values` in row-major order at byte `offset`; return where they end."""
    for band in bands(values):
        offset = pwrite(fd, tensor_bytes(band), offset)
    return offset


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order. They share its memory when it is contiguous."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return np.ascontiguousarray(_array(tensor)).reshape(-1).view(np.uint8).data


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at `offset`; return where it ends."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return offset + done


def _array(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's memory as integers. numpy copies in the calling thread, torch would wake a thread pool."""
    return tensor.detach().view(INTEGERS[tensor.dtype.itemsize]).numpy()


def _pread(fd: int, into: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            raise UserError(f"{path}: truncated (ends inside a tensor)")
        done += count
