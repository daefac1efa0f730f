"""Safetensors files, read and written piece by piece: memory contains one tensor, never a whole file.

The safetensors library maps whole files to read them, and writes a file from all its tensors at once. The format is
eight bytes of header length, a JSON header, and the tensors' bytes; see https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.models.files.regular import opened, parse_json, short
from megarl.models.files.tensor_io import Values, describe, pwrite, write

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, as in the library


def described_tensors(path: Path) -> dict[str, Tensor]:
    """Name → description of a file's tensors, in file order. UserError unless it is complete and well-formed."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise UserError(f"{path}: not a safetensors file, or truncated inside its header")
        text = file.read(length)
    header = parse_json(path, text)
    try:
        header.pop("__metadata__", None)
        _check_types(path, header)
        tensors, end = {}, 0
        for name, fact in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            tensor = torch.empty(fact["shape"], dtype=DTYPES[fact["dtype"]], device="meta")
            if fact["data_offsets"] != [end, end + tensor.nbytes]:
                raise ValueError(f"tensor {name} is not where its shape says")
            tensors[name] = describe(tensor, path, 8 + length + end)
            end += tensor.nbytes
    except UserError:
        raise
    except Exception as e:  # of many kinds, because damage can be anywhere
        raise UserError(f"{path}: not a safetensors file ({short(e)})") from None
    if size != 8 + length + end:
        raise UserError(f"{path}: truncated or overlong: {size} bytes, {8 + length + end} by its header")
    return tensors


def _check_types(path: Path, header: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError that names the first tensor of a type that is not trained here, such as packed 4-bit weights."""
    for name, fact in header.items():
        if isinstance(fact["dtype"], str) and fact["dtype"] not in DTYPES:
            raise UserError(
                f"{path}: {short(name)}: has type {short(fact['dtype'])}, which is not a type of weights here; "
                "quantised weights cannot be trained, use the bf16 release"
            )


class SafetensorsWriter:
    """A file written tensor by tensor, in any order, by several threads. It is valid once all are written."""

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

    def write(self, name: str, values: Values) -> None:
        write(self._fd, values, self._starts[name])

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
