"""torch.save's archives inside larger files: what we write torch.load reads, and what torch.save writes we map."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from checkpoints_conv.archive import ArchiveWriter, described, filled, read_archive
from megarl.errors import UserError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("start", [0, 64, 77])
def test_written_archives_are_torchs(dtype: torch.dtype, start: int, tmp_path: Path) -> None:
    """Written in two blocks at any byte; loaded by torch as a file of its own, and mapped from its place. The second
    archive of the same shape takes the frame of the first."""
    writer, tensor = ArchiveWriter(tmp_path), (torch.randn(6, 50) * 9).to(dtype)
    with open(tmp_path / "file", "w+b") as file:
        middle = writer.write(file.fileno(), start, (1, 6, 50), [tensor[:2], tensor[2:]])
        end = writer.write(file.fileno(), middle, (1, 6, 50), [tensor])
        content = file.read()
    for first, last in ((start, middle), (middle, end)):
        loaded = torch.load(io.BytesIO(content[first:last]), weights_only=True)
        assert loaded.shape == (1, 6, 50) and torch.equal(loaded[0], tensor)
        assert torch.equal(read_archive(tmp_path / "file", first, last - first)[0], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_any_strides_and_offsets_are_read(tmp_path: Path) -> None:
    """torch.save keeps a view's whole storage and its strides; so may a trainer's checkpoint."""
    tensor = torch.arange(60.0).view(6, 10)[1:4].T
    saved = io.BytesIO()
    torch.save(tensor, saved)
    (tmp_path / "file").write_bytes(b"x" * 13 + saved.getvalue() + b"y")
    assert torch.equal(read_archive(tmp_path / "file", 13, len(saved.getvalue())), tensor)


def test_tensors_of_one_storage_are_mapped_apart(tmp_path: Path) -> None:
    """As Megatron saves the parameters that lie in one buffer: each tensor brings only its own bytes into memory."""
    buffer = torch.randn(1000)
    tensors = {
        "first": buffer[:10],
        "matrix": buffer[100:400].view(30, 10)[:, 2:5],
        "last": buffer[-1],
        "none": buffer[:0],
    }
    torch.save(tensors, tmp_path / "file")
    found = {name: filled(tensor, tmp_path / "file") for name, tensor in described(tmp_path / "file").items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    sizes = {name: tensor.untyped_storage().nbytes() // 4 for name, tensor in found.items()}
    assert sizes == {"first": 10, "matrix": 29 * 10 + 3, "last": 1, "none": 0}


def test_a_mapped_tensor_changes_no_file(tmp_path: Path) -> None:
    saved = io.BytesIO()
    torch.save(torch.ones(1000), saved)
    (tmp_path / "file").write_bytes(saved.getvalue())
    read_archive(tmp_path / "file", 0, len(saved.getvalue())).zero_()
    assert (tmp_path / "file").read_bytes() == saved.getvalue()


def test_damage_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="file: damaged at byte 100"):
        read_archive(tmp_path / "file", 100, 2000)
