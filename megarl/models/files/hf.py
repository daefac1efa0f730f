"""Hugging Face's side: a folder of safetensors, read slice by slice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megarl.errors import UserError, nearest
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.archive import read_archive
from megarl.models.files.regular import read_json, short
from megarl.models.files.safetensors_file import described_tensors
from megarl.models.files.tensor_io import bands, loaded
from megarl.models.layout import Layout
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED_INDEX, PICKLED_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
BESIDE = {"training_args.bin", "optimizer.bin", "scheduler.bin", "adapter_model.bin", "adapter_model.safetensors"}
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # of all experts of a layer
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class HfWeights:
    """The weights of one model folder (a `Checkpoint`). Opening reads the headers of its files."""

    format = "Hugging Face"

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        found = _apart(_found(folder, allow_pickle))
        self.names = {name: file for name, (file, _) in found.items()}  # tensor name → file name
        self._tensors = {name: tensor for name, (_, tensor) in found.items()}  # described

    @cached_property
    def model(self) -> ModelShape:
        return read_shape(self.folder)

    def tensor(self, name: str) -> Tensor:
        """The tensor's description."""
        if name not in self.names:
            near = short(nearest(name, self.names), 200)
            raise UserError(f"{self.folder}: tensor {name} is missing {near}".rstrip())
        return self._tensors[name]

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
            if not self.tensor(name).dtype.is_floating_point:
                raise UserError(
                    f"{name}: has {self.tensor(name).dtype} values; quantised weights cannot be trained, use the bf16 "
                    "release"
                )
        extra = self.names.keys() - parts.keys()
        if HEAD in extra and self.model.tied:
            self._check_head()
            extra -= {HEAD}
        # Written by transformers before 4.32; computed, not learned.
        extra = {name for name in extra if not name.endswith(".rotary_emb.inv_freq")}
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise UserError(f"{self.folder}: {short(min(extra))}{more}: no rule of the map covers this tensor")

    def _check_head(self) -> None:
        """A tied model's files may repeat the embedding as the output layer. UserError if it is another one.

        transformers 5 then keeps both, and ties nothing; transformers 4 and the engines ignore the head.
        """
        head, embedding = self.tensor(HEAD), self.tensor(EMBEDDING)
        if head.shape == embedding.shape and head.dtype == embedding.dtype:
            rows = max(1, 2**20 // max(1, head.shape[1] * head.itemsize))
            if all(map(torch.equal, bands(head, rows), bands(embedding, rows))):
                return
        raise UserError(
            f"{self.folder}: {HEAD} is not {EMBEDDING}, though config.json ties them; set tie_word_embeddings to false "
            f"there to keep both, or delete {HEAD}"
        )

    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.names.values()))]


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


Found = dict[str, tuple[str, Tensor]]  # tensor name → file name, description


def _found(folder: Path, allow_pickle: bool) -> Found:
    """The tensors of the files that transformers would choose, from their headers.

    transformers takes the single file if there is one, else those that the index names. Without either it takes none;
    here all safetensors files are taken together. UserError if a tensor stands in two of them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: does not exist" if not folder.exists() else f"{folder}: is not a folder")
    indexed, files = _files(folder, allow_pickle)
    found: Found = {}
    for file in files:
        read = described_tensors if file.endswith(".safetensors") else _pickled_tensors
        for name, tensor in read(folder / file).items():
            if name in found:
                raise UserError(
                    f"{folder}: tensor {short(name)} stands twice, in {found[name][0]} and in {file}; delete the "
                    "files of the older save"
                )
            found[name] = file, tensor
    for name, file in indexed.items():
        if name not in found or found[name][0] != file:
            raise UserError(f"{folder / file}: tensor {short(name)} is missing, though the index lists it there")
    return found


def _files(folder: Path, allow_pickle: bool) -> tuple[dict[str, str], list[str]]:
    """What the index says, if one counts, and the names of the weight files."""
    kinds = [(SINGLE, INDEX, "*.safetensors"), (PICKLED_SINGLE, PICKLED_INDEX, "*.bin")]
    for single, index, pattern in kinds:
        pickled = pattern == "*.bin"
        loose = sorted(file.name for file in folder.glob(pattern) if file.name not in BESIDE)
        if not (loose or (folder / index).exists()):
            continue
        if pickled and not allow_pickle:
            raise UserError(f"{folder}: has only pickled weights (*.bin); --allow-pickle reads the tensors in them")
        if (folder / single).exists():
            return {}, [single]
        if (folder / index).exists():
            indexed = _weight_map(folder / index)
            return indexed, sorted(set(indexed.values()))
        return {}, loose
    raise UserError(f"{folder}: has no *.safetensors")


def _weight_map(index: Path) -> dict[str, str]:
    """What an index says: tensor name → file name. UserError unless all its files are there."""
    contents = read_json(index)
    found = contents.get("weight_map") if isinstance(contents, dict) else None
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise UserError(f"{index}: is not an index of weight files (no weight_map of names)")
    files = sorted(set(found.values()))
    strange = next((file for file in files if Path(file).name != file), None)
    if strange is not None:
        raise UserError(f"{index}: weight_map: {short(repr(strange))} is not a file of this folder")
    there = {file.name for file in index.parent.iterdir()}
    missing = [file for file in files if file not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{index}: names {short(missing[0])}{more}, which is missing; {len(files)} files are named")
    return found


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Name → description, of a `*.bin` file. Only tensors are unpickled; nothing in the file runs."""
    found = read_archive(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a file of tensors (it has a {type(found).__name__})")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: not a file of tensors ({short(repr(name), 80)} is a {type(tensor).__name__})")
    return found


def _apart(tensors: Found) -> Found:
    """Experts by their own names where the files have them stacked, as transformers 5 holds them in memory.

    `experts.gate_up_proj` is [experts, 2 x ffn, hidden], `experts.down_proj` is [experts, hidden, ffn].
    """
    found: Found = {}
    for name, (file, tensor) in tensors.items():
        stem, _, last = name.rpartition(".")
        parts = STACKED.get(last, ()) if stem.endswith(".mlp.experts") and tensor.dim() == 3 else ()
        if not parts or tensor.shape[1] % len(parts):
            found[name] = file, tensor
            continue
        for part, block in zip(parts, tensor.chunk(len(parts), 1), strict=True):
            for expert in range(len(tensor)):
                own = f"{stem}.{expert}.{part}.weight"
                if own in tensors:
                    raise UserError(f"{file}: tensor {short(own)} stands twice, alone and in {short(name)}")
                found[own] = file, block[expert]
    return found
