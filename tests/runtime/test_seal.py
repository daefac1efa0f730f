"""Objects between ranks are unpickled only with the run's seal."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megarl.errors import RunError
from megarl.runtime.seal import SIZE, seal_objects


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch):
    for name in ("_object_to_tensor", "_tensor_to_object"):  # put back afterwards
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensor_of(value: object) -> torch.Tensor:
    data = io.BytesIO()
    pickle.dump(value, data)
    return torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)


def test_sealed_objects_pass(group: None) -> None:
    """Through torch's own object collectives."""
    seal_objects(b"k" * SIZE)
    value = {"tensor": torch.arange(5), "text": "é" * 1000}
    gathered: list[object] = [None]
    dist.all_gather_object(gathered, value)
    box = [value]
    dist.broadcast_object_list(box)
    assert gathered[0]["text"] == box[0]["text"] == value["text"]  # type: ignore[index]
    assert torch.equal(gathered[0]["tensor"], value["tensor"])  # type: ignore[index]


@pytest.mark.parametrize("mark", ["none", "zeros", "another key", "another message"])
def test_an_object_without_the_seal_is_not_unpickled(tmp_path: Path, group: None, mark: str) -> None:
    """Code in it does not run, whatever stands in place of the seal."""
    bomb = tensor_of(Bomb(tmp_path / "exploded"))
    if mark == "zeros":
        bomb = torch.cat([bomb, torch.zeros(SIZE, dtype=torch.uint8)])
    if mark in ("another key", "another message"):
        sealing = b"x" * SIZE if mark == "another key" else b"k" * SIZE
        seal_objects(sealing)
        other, _ = distributed_c10d._object_to_tensor("hello", torch.device("cpu"), None)
        bomb = torch.cat([bomb, other[-SIZE:]])
    seal_objects(b"k" * SIZE)
    with pytest.raises(RunError, match="not sent by this run"):
        distributed_c10d._tensor_to_object(bomb, len(bomb), None)
    assert not (tmp_path / "exploded").exists()
