"""torch.save's archives inside larger files: what we write torch.load reads, and what torch.save writes we read."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.models.files import tensor_io
from megarl.models.files.archive import ArchiveWriter, read_archive
from megarl.models.files.tensor_io import bands, describe, loaded, write


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("start", [0, 64, 77])
def test_written_archives_are_torchs(dtype: torch.dtype, start: int, tmp_path: Path) -> None:
    """Written in two blocks at any byte; loaded by torch as a file of its own, and read from its place. The second
    archive of the same shape takes the frame of the first."""
    writer, tensor = ArchiveWriter(tmp_path), (torch.randn(6, 50) * 9).to(dtype)
    with open(tmp_path / "file", "w+b") as file:
        middle = writer.write(file.fileno(), start, (1, 6, 50), [tensor[:2], tensor[2:]])
        end = writer.write(file.fileno(), middle, (1, 6, 50), [tensor])
        content = file.read()
    for first, last in ((start, middle), (middle, end)):
        read = torch.load(io.BytesIO(content[first:last]), weights_only=True)
        assert read.shape == (1, 6, 50) and torch.equal(read[0], tensor)
        assert torch.equal(loaded(read_archive(tmp_path / "file", first, last - first))[0], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_any_strides_and_offsets_are_read(tmp_path: Path) -> None:
    """torch.save keeps a view's whole storage and its strides; so may a trainer's checkpoint."""
    tensor = torch.arange(60.0).view(6, 10)[1:4].T
    saved = io.BytesIO()
    torch.save(tensor, saved)
    (tmp_path / "file").write_bytes(b"x" * 13 + saved.getvalue() + b"y")
    assert torch.equal(loaded(read_archive(tmp_path / "file", 13, len(saved.getvalue()))), tensor)


def test_of_one_storage_each_tensor_reads_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Megatron saves the parameters that lie in one buffer: each tensor reads from its first value to its last."""
    buffer = torch.randn(1000)
    tensors = {
        "first": buffer[:10],
        "matrix": buffer[100:400].view(30, 10)[:, 2:5],
        "last": buffer[-1],
        "none": buffer[:0],
    }
    torch.save(tensors, tmp_path / "file")
    found = read_archive(tmp_path / "file")
    assert found.keys() == tensors.keys()
    preadv, counts = os.preadv, []
    monkeypatch.setattr("os.preadv", lambda *place: counts.append(preadv(*place)) or counts[-1])
    sizes = {}
    for name, tensor in tensors.items():
        counts.clear()
        assert torch.equal(loaded(found[name]), tensor), name
        sizes[name] = sum(counts) // 4
    assert sizes == {"first": 10, "matrix": 29 * 10 + 3, "last": 1, "none": 0}


@pytest.mark.parametrize("size", [1, 100, 1000, 2**20])
def test_views_come_band_by_band(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, columns, a reshaped tensor and a transposed one, with a row, some or all rows to a band."""
    monkeypatch.setattr(tensor_io, "BAND", size)
    tensor = torch.randn(20, 6, 10)
    torch.save(tensor, tmp_path / "file")
    described_ = read_archive(tmp_path / "file")
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t[3:17],
        lambda t: t.view(120, 10)[5:, 2:7],
        lambda t: t[:, 2:4, 1:],
        lambda t: t.view(20, 60).T,
        lambda t: t[7, 2, 9],
    ]
    for number, view in enumerate(views):
        read = [band.clone() for band in bands(view(described_))]
        expected = view(tensor)
        assert torch.equal(torch.cat(read).view(expected.shape), expected), number
        assert torch.equal(loaded(view(described_)), expected), number
        with open(tmp_path / "written", "w+b") as file:
            assert write(file.fileno(), view(described_), 5) == 5 + expected.nbytes
            assert file.read()[5:] == expected.contiguous().numpy().tobytes(), number


def test_a_file_that_ends_early_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    tensor = describe(torch.empty(50, device="meta"), tmp_path / "file", 4)
    with pytest.raises(UserError, match="file: truncated"):
        loaded(tensor)


def test_damage_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="file: damaged at byte 100"):
        read_archive(tmp_path / "file", 100, 2000)
