"""Writes Hugging Face's format: safetensors files and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from checkpoints_conv.unit import Unit
from megarl.models.families import rules
from megarl.models.files.hf import INDEX, SINGLE
from megarl.models.files.safetensors_file import SafetensorsWriter
from megarl.models.files.tensor_io import Values
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape


class HfWriter:
    """Writes safetensors files of at most `shard_bytes` (a unit is never split) and their index."""

    def __init__(self, model: ModelShape, shard_bytes: int = 5 * 10**9) -> None:
        self.model, self.shard_bytes = model, shard_bytes
        self.settings = {"format": "hf", "shard_bytes": shard_bytes}
        self._files: dict[int, SafetensorsWriter] = {}  # unit → its file

    def rules(self) -> list[Rule]:
        return [rule for rule in rules(self.model) if not rule.copy]

    def nbytes(self, units: Iterable[Unit]) -> int:
        return sum(unit.nbytes for unit in units)

    def lay_out(self, folder: Path, units: list[Unit]) -> None:
        self.folder = folder
        shards: list[list[Unit]] = [[]]
        for unit in units:
            if shards[-1] and sum(u.nbytes for u in shards[-1]) + unit.nbytes > self.shard_bytes:
                shards.append([])
            shards[-1].append(unit)
        self._weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {
                part.name: (dtype, part.shape) for unit in shard for rule, dtype in unit.items() for part in rule.parts
            }
            self._weight_map |= dict.fromkeys(tensors, name)
            file = SafetensorsWriter(folder / name, tensors)
            self._files |= {unit.index: file for unit in shard}
        self._total = self.nbytes(units)

    def write(self, unit: Unit, tensors: Iterable[tuple[Rule, Mapping[str, Values]]]) -> list:
        for _, parts in tensors:
            for name, values in parts.items():
                self._files[unit.index].write(name, values)
        self._files[unit.index].sync()  # now, while other threads read
        return []

    def finish(self, units: list[Unit], records: Mapping[int, list]) -> None:
        if SINGLE not in self._weight_map.values():
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._weight_map.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        for file in set(self._files.values()):
            file.close()
        self._files.clear()
