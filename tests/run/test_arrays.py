"""A checkpoint's arrays are read as numpy wrote them, or refused in one line before they take memory."""

from __future__ import annotations

import io
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from megarl.errors import UserError
from megarl.run.arrays import read_arrays
from tests.support.damage import damaged_bytes

ARRAYS = {
    "position": np.array(7),
    "ahead": np.arange(12).reshape(3, 4),
    "print": np.array("abc"),
    "none": np.zeros(0),
}


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **ARRAYS)
    read = read_arrays(tmp_path / "x.npz")
    assert read.keys() == ARRAYS.keys()
    assert all(np.array_equal(read[name], array) for name, array in ARRAYS.items())


def test_objects_and_bombs_are_refused(tmp_path: Path) -> None:
    """An object array is a pickle; a compressed one, or one that only says that it is large, is a bomb."""
    file = tmp_path / "x.npz"
    np.savez(file, a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="x.npz: damaged"):
        read_arrays(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.savez_compressed(file, a=np.zeros(10))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(10**7))
    with pytest.raises(UserError, match="is compressed"):
        read_arrays(file)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9, 10**3)})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + bytes(80))
    with pytest.raises(UserError, match="does not have the float64 values of its shape"):
        read_arrays(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_damage_is_one_line(tmp_path: Path) -> None:
    file, refused = tmp_path / "x.npz", 0
    np.savez(file, **ARRAYS)
    whole = file.read_bytes()
    for seed in range(100):
        file.write_bytes(damaged_bytes(whole, seed))
        try:
            read_arrays(file)
        except UserError as e:
            assert str(e).isprintable(), seed
            refused += 1
    assert refused > 40
