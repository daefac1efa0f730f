"""Safetensors files read and written piece by piece, so that memory holds one tensor and never a file.

The safetensors library maps whole files on reading and needs a whole file's tensors on writing. The format is eight
bytes of header length, a JSON header, and the tensors' bytes; see https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_conv.tensor_io import mapped, pwrite, tensor_bytes
from megarl.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the library


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file open for reading; safe to share between threads. UserError unless it is whole and well-formed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
        try:
            self.entries = self._read_header()
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor, or the part that `index` (one slice a dim, step 1) selects. Rows outside it are not read.

        Mapped: it stays valid after `close`, and its memory is given back with it.
        """
        entry = self.entries[name]
        if index is None or not entry.shape:
            return mapped(self._fd, self.path, entry.dtype, entry.shape, entry.start)
        rows, *columns = (range(*i.indices(n)) for i, n in zip(index, entry.shape, strict=True))
        row_bytes = prod(entry.shape[1:]) * entry.dtype.itemsize
        shape, start = (len(rows), *entry.shape[1:]), entry.start + rows.start * row_bytes
        block = mapped(self._fd, self.path, entry.dtype, shape, start)
        return block[(slice(None), *(slice(c.start, c.stop) for c in columns))]

    def close(self) -> None:
        os.close(self._fd)

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise UserError(f"{self.path}: not a safetensors file, or truncated inside its header")
        try:
            header = json.loads(os.pread(self._fd, length, 8))
            header.pop("__metadata__", None)
            entries, end = {}, 0
            for name, fact in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                entry = Entry(DTYPES[fact["dtype"]], tuple(fact["shape"]), 8 + length + fact["data_offsets"][0])
                if fact["data_offsets"] != [end, end + entry.nbytes]:
                    raise ValueError(f"tensor {name} does not lie where its shape says")
                end += entry.nbytes
                entries[name] = entry
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{self.path}: not a safetensors file ({e})") from None
        if size != 8 + length + end:
            raise UserError(f"{self.path}: truncated or overlong: {size} bytes, {8 + length + end} by its header")
        return entries


class SafetensorsWriter:
    """A file written tensor by tensor, in any order, by several threads. All of them must be written before use."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Lay out the file for `tensors` (name → dtype, shape). An existing file of the same layout is kept."""
        facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name, (dtype, shape) in tensors.items():
            starts[name], end = end, end + prod(shape) * dtype.itemsize
            facts[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
        header = json.dumps(facts, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._starts = {name: 8 + len(header) + start for name, start in starts.items()}
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        pwrite(self._fd, memoryview(len(header).to_bytes(8, "little") + header), 0)
        os.truncate(self._fd, 8 + len(header) + end)

    def write(self, name: str, tensor: Tensor) -> None:
        pwrite(self._fd, tensor_bytes(tensor), self._starts[name])

    def sync(self) -> None:
        """Wait until what is written is on the disk."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
