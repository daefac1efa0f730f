"""Arrays of a run's checkpoint, in numpy's format: read without pickle, and never larger than their file."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import numpy as np
from numpy.lib import format as npy

from megarl.models.files.archive import stored_entries
from megarl.models.files.regular import opened
from megarl.run.records import damaged


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """What `np.savez` wrote: name → array. UserError for a file that is damaged, compressed, or has objects in it."""
    with opened(file) as stream, damaged(file):
        with ZipFile(stream) as archive:
            for entry in stored_entries(archive, file.stat().st_size):
                _check(archive, entry.filename, entry.file_size)
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as arrays:
            return dict(arrays)


def _check(archive: ZipFile, name: str, size: int) -> None:
    """ValueError unless the array has the bytes that its header says."""
    with archive.open(name) as stream:
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(stream)
        values = size - stream.tell()
    if dtype.hasobject or dtype.itemsize * int(np.prod(shape, dtype=object)) != values:
        raise ValueError(f"{name} does not have the {dtype} values of its shape, {shape}")
