"""Hugging Face's side: a folder of safetensors, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from megarl.errors import UserError, nearest
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.archive import described, placed
from megarl.models.files.safetensors_file import described_tensors
from megarl.models.files.tensor_io import loaded
from megarl.models.layout import Layout
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


class HfWeights:
    """The weights of one model folder (a `Checkpoint`). Files are opened when first needed."""

    format = "Hugging Face"

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Tensor]] = {}  # file name → its tensors, described
        self._lock = Lock()
        self.names = _index(folder, allow_pickle, self._in_file)  # tensor name → file name

    @cached_property
    def model(self) -> ModelShape:
        return read_shape(self.folder)

    def tensor(self, name: str) -> Tensor:
        """The tensor's description."""
        if name not in self.names:
            raise UserError(f"{self.folder}: tensor {name} is missing{nearest(name, self.names)[:200]}")
        tensors = self._in_file(self.names[name])
        if name not in tensors:
            path = self.folder / self.names[name]
            raise UserError(f"{path}: tensor {name} is missing, though the index lists it there")
        return tensors[name]

    def parts(self, rule: Rule) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in rule.hf}

    def dtype(self, rule: Rule) -> torch.dtype:
        first, *rest = rule.hf
        for name in rest:
            if self.tensor(name).dtype != self.tensor(first).dtype:
                raise UserError(
                    f"{name}: is {self.tensor(name).dtype} but {first} is {self.tensor(first).dtype}, and both are "
                    f"part of {rule.megatron}; choose one type with --dtype"
                )
        return self.tensor(first).dtype

    def check_whole(self) -> None:
        self.check(rules(self.model))

    def check(self, rules: Iterable[Rule]) -> None:
        """Raise UserError unless the folder has exactly the tensors of `rules`, each in its shape."""
        parts = {part.name: (part, rule) for rule in rules for part in rule.parts}
        for name, (part, rule) in parts.items():
            if self.tensor(name).shape != part.shape:
                raise UserError(
                    f"{name}: shape {list(self.tensor(name).shape)} on disk, {list(part.shape)} by the rule of "
                    f"{rule.megatron}"
                )
        extra = self.names.keys() - parts.keys()
        # A tied model's files may repeat the embedding as the output layer. transformers ignores it too.
        extra -= {"lm_head.weight"} if self.model.tied else set()
        # Written by transformers before 4.32; computed, not learned.
        extra = {name for name in extra if not name.endswith(".rotary_emb.inv_freq")}
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UserError(f"{self.folder}: {min(extra)}{more}: no rule of the map covers this tensor")

    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.names.values()))]

    def _in_file(self, name: str) -> dict[str, Tensor]:
        with self._lock:
            if name not in self._files:
                read = described_tensors if name.endswith(".safetensors") else _pickled_tensors
                self._files[name] = read(self.folder / name)
            return self._files[name]


def load_shards(
    weights: HfWeights, rules: Mapping[str, Rule], layout: Layout, tp_rank: int, expert_tp_rank: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """This rank's tensors by local name. Each rank reads only its own part of the files.

    `rules`: from `layout.local_rules`. `expert_tp_rank` defaults to `tp_rank`: right when both groups are the same.
    """
    for name, rule in rules.items():
        size = layout.shards(rule)
        rank = tp_rank if rule.expert is None or expert_tp_rank is None else expert_tp_rank
        pieces = {hf: loaded(weights.tensor(hf)[index]) for hf, index in rule.slices(rank, size).items()}
        yield name, rule.fuse(pieces, size)


def _index(folder: Path, allow_pickle: bool, opener: Callable) -> dict[str, str]:
    """Tensor name → file name, from the index or else from the files' headers."""
    if not folder.is_dir():
        raise UserError(f"{folder}: does not exist" if not folder.exists() else f"{folder}: is not a folder")
    for index in (INDEX, PICKLED_INDEX) if allow_pickle else (INDEX,):
        if (folder / index).is_file():
            return _weight_map(folder / index)
    files = [SINGLE] if (folder / SINGLE).is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        if not allow_pickle:
            raise UserError(f"{folder}: has only pickled weights (*.bin); --allow-pickle reads the tensors in them")
        files = (
            [PICKLED_SINGLE] if (folder / PICKLED_SINGLE).is_file() else sorted(f.name for f in folder.glob("*.bin"))
        )
    if not files:
        raise UserError(f"{folder}: has no *.safetensors")
    return {name: file for file in files for name in opener(file)}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: is not an index of weight files (no weight_map)") from None
    for file in set(found.values()):
        if Path(file).name != file:
            raise UserError(f"{index}: weight_map: {file!r} is not a file of this folder")
    return found


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Name → description, of a `*.bin` file. Only tensors are unpickled; nothing in the file runs."""
    try:
        return {name: placed(tensor, path) for name, tensor in described(path).items()}
    except Exception as e:  # torch.load raises many kinds; each means that this is not a file of tensors
        raise UserError(f"{path}: not a file of tensors ({str(e).splitlines()[0]})") from None
