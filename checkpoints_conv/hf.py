"""Hugging Face's side: a folder of safetensors, read tensor by tensor or slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_conv.layout import Layout
from checkpoints_conv.rules import Rule
from megarl.errors import UserError, nearest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth")


class HfWeights:
    """The weights of one model folder. Files are opened when first needed and stay open until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _files(folder)  # tensor name → file name
        self._open: dict[str, safe_open] = {}

    def __enter__(self) -> HfWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor, or the part of it that `index` selects; only that part is read from disk."""
        lazy = self._slice(name)
        if index is None:
            return lazy[:]
        sizes = [range(*i.indices(n)) for i, n in zip(index, lazy.get_shape(), strict=True)]
        if not all(sizes):
            return lazy[:0].new_empty([len(size) for size in sizes])
        return lazy[index]

    def check(self, rules: Iterable[Rule]) -> None:
        """Raise UserError unless the folder holds exactly the tensors of `rules`, each in its shape."""
        parts = {part.name: (part, rule) for rule in rules for part in rule.parts}
        for name, (part, rule) in parts.items():
            if self.shape(name) != part.shape:
                raise UserError(
                    f"{name}: shape {self.shape(name)} on disk, {part.shape} by the rule of {rule.megatron}"
                )
        # Files of tied models may repeat the embedding as the output layer; transformers drops it, and so do we.
        extra = sorted(self.files.keys() - parts.keys() - ({"lm_head.weight"} if _tied(parts) else set()))
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UserError(f"{self.folder}: {extra[0]}{more}: no rule of the map covers this tensor")

    def close(self) -> None:
        self._open.clear()

    def _slice(self, name: str):
        if name not in self.files:
            raise UserError(f"{self.folder}: tensor {name} is missing{nearest(name, self.files)[:200]}")
        file = self.files[name]
        if file not in self._open:
            self._open[file] = open_safetensors(self.folder / file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError:
            raise UserError(f"{self.folder / file}: tensor {name} is missing, though {INDEX} lists it there") from None


def load_shards(
    weights: HfWeights, rules: Mapping[str, Rule], layout: Layout, tp_rank: int, expert_tp_rank: int | None = None
) -> Iterator[tuple[str, Tensor]]:
    """This rank's tensors by local name, straight from the files; each rank reads only what it holds.

    `rules`: from `layout.local_rules`. `expert_tp_rank` defaults to `tp_rank`, as when the two groups are the same.
    """
    for name, rule in rules.items():
        size = layout.shards(rule)
        rank = tp_rank if rule.expert is None or expert_tp_rank is None else expert_tp_rank
        pieces = {hf: weights.read(hf, index) for hf, index in rule.slices(rank, size).items()}
        yield name, rule.fuse(pieces, size)


def open_safetensors(file: Path) -> safe_open:
    """Open a safetensors file; UserError for a missing, truncated or foreign one."""
    if not file.is_file():
        raise UserError(f"{file}: does not exist")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: truncated or not a safetensors file ({e})") from None


def _files(folder: Path) -> dict[str, str]:
    """Tensor name → file name, from the index, else from the headers of the files."""
    index = folder / INDEX
    if index.is_file():
        try:
            return dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{index}: is not an index of safetensors files (no weight_map)") from None
    files = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        if any(file for pattern in PICKLES for file in folder.glob(pattern)):
            raise UserError(f"{folder}: holds pickled weights only; save the model as safetensors first")
        raise UserError(f"{folder}: holds no *.safetensors" if folder.is_dir() else f"{folder}: does not exist")
    return {name: file.name for file in files for name in open_safetensors(file).keys()}  # noqa: SIM118 (no mapping)


def _tied(parts: Mapping[str, object]) -> bool:
    return "lm_head.weight" not in parts
