"""Tensors and bytes of files: mapped rather than read, written without copies in between."""

from __future__ import annotations

import contextlib
import mmap
import os
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import UserError

# Brings the pages in at once, rather than fault by fault. Linux 5.14; not in Python's mmap module.
MADV_POPULATE_READ = 22


def mapped(fd: int, path: Path, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    """The tensor that lies in row-major order at byte `start` of a file. Its memory is the file's, until it is changed.

    `path` is for the message; UserError when the file ends inside the tensor.
    """
    nbytes = prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    base = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        pages = mmap.mmap(fd, start - base + nbytes, access=mmap.ACCESS_COPY, offset=base)
    except ValueError:
        raise UserError(f"{path}: truncated (ends inside a tensor)") from None
    with contextlib.suppress(OSError):  # advice, which another system may not know
        pages.madvise(mmap.MADV_WILLNEED)
        pages.madvise(MADV_POPULATE_READ)
    flat = torch.frombuffer(pages, dtype=torch.uint8, count=nbytes, offset=start - base)
    if start % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order; shares its memory when it is contiguous."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def pwrite(fd: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at `offset`; returns where it ends."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
    return offset + done
