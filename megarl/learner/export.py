"""The learner's weights as a model folder in Hugging Face's layout, which every engine and tool reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megarl.errors import UserError
from megarl.learner.learner import Learner
from megarl.learner.parallel import World
from megarl.models.files.companions import copy_companions, set_dtype


def export(learner: Learner, world: World, source: Path, folder: Path, shard_bytes: int = 5 * 10**9) -> None:
    """Write the policy to `folder`, with the tokenizer and configuration of `source`. Collective.

    Weights are streamed into files of at most `shard_bytes`; the controller has one file in memory at a time. The
    folder appears under its name when it is complete. Raises UserError if it already exists.
    """
    partial = folder.with_name(folder.name + ".partial")
    if world.is_controller:
        if folder.exists():
            raise UserError(f"export: {folder} already exists")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_companions(source, partial)
    writer = _Shards(partial, shard_bytes) if world.is_controller else None
    for name, tensor in learner.named_tensors():
        if writer:
            writer.add(name, tensor)
    if writer:
        writer.finish()
        partial.rename(folder)
    world.barrier(f"the export to {folder}")


class _Shards:
    """Collects tensors and writes a file whenever the next tensor would not fit."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []  # names of the tensors in each file written
        self._bytes = self._total = 0
        self._dtype: torch.dtype | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self.shard_bytes:
            self._write()
        self._pending[name] = tensor.detach().cpu().contiguous().clone()
        self._bytes += size
        self._total += size
        self._dtype = tensor.dtype

    def finish(self) -> None:
        self._write()
        assert self._dtype is not None, "a model has tensors"
        set_dtype(self.folder / "config.json", self._dtype)
        count = len(self._files)
        if count == 1:
            self._shard(0).rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._shard(number).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        save_file(self._pending, self._shard(len(self._files)), {"format": "pt"})
        self._files.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"
