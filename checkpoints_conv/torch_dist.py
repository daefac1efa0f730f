"""Megatron's distributed checkpoint (torch_dist), read and written by one process without a process group.

Every tensor is stored once and whole, so a trainer can load it under any TP, PP, VPP and EP. Tensors of the layers are
stacked under one key, with the layer (and the expert) as leading dimensions, one chunk per layer. The format is that of
torch.distributed.checkpoint, with the keys that Megatron-Core's `sharded_state_dict` needs.
"""

from __future__ import annotations

import json
import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoints_conv.checkpoint import RELEASE, TRACKER, megatron_arguments, megatron_folders, parts_of
from checkpoints_conv.unit import Unit
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.archive import ALIGNMENT, OVERHEAD, ArchiveWriter, read_tensor
from megarl.models.files.safetensors_file import DTYPES, NAMES
from megarl.models.files.tensor_io import Values, in_one_piece, read
from megarl.models.files.torch_metadata import check_tiled, load_metadata
from megarl.models.layout import Layout
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape

PADDING = 2**17  # most rows of padding that a vocabulary may have


class Key(NamedTuple):
    """Where a Megatron tensor is stored: its key, and its index in the key's leading dimensions."""

    key: str
    at: tuple[int, ...]
    of: tuple[int, ...]  # sizes of the leading dimensions: layers, experts


def stored_keys(rule: Rule, model: ModelShape) -> list[Key]:
    """The keys that Megatron may give to `rule`'s tensor. Both layer specs read the first."""
    if rule.layer is None:
        return [Key(rule.megatron, (), ())]
    name = rule.megatron.removeprefix(f"decoder.layers.{rule.layer}.")
    at: tuple[int, ...] = (rule.layer,)
    of: tuple[int, ...] = (model.layers,)
    if rule.expert is not None and model.moe is not None:
        name = "mlp.experts.experts." + name.removeprefix(f"mlp.experts.local_experts.{rule.expert}.")
        at, of = (rule.layer, rule.expert), (model.layers, model.moe.count)
    names = [name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")]
    if name == "pre_mlp_layernorm.weight":
        fused = "mlp.linear_fc1.layer_norm_weight"
        # Before a router TE's spec keeps the norm's own name, but Megatron's local spec renames it anyway.
        names = [fused] if model.moe is None else [name, fused]
    stacked = [Key(f"decoder.layers.{name}", at, of) for name in names]
    apart = [Key(f"decoder.layers.{rule.layer}.{name}", at[1:], of[1:]) for name in names]  # non_homogeneous_layers
    return stacked + apart


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored piece of a tensor: its place in the tensor and in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class TorchDist:
    """The model weights of a torch_dist checkpoint (a `Checkpoint`). Optimizer state is not read."""

    format = "Megatron torch_dist"

    def __init__(self, folder: Path, config: Path) -> None:
        self.weights = folder
        self.folder = config if config.is_dir() else config.parent
        self.model = read_shape(config)
        self._facts: dict[str, TensorStorageMetadata] = {}
        self._chunks: dict[tuple[str, tuple[int, ...]], list[Chunk]] = defaultdict(list)  # by key and leading index
        leading = {key: len(at) for rule in rules(self.model) for key, at, _ in stored_keys(rule, self.model)}
        self._own = {rule.hf: rule for rule in rules(self.model) if not rule.copy}
        self._read_metadata(leading)

    def check_whole(self) -> None:
        for rule in self._own.values():
            key = self._find(rule)
            size, expected = tuple(self._facts[key.key].size), (*key.of, *rule.shape())
            padded = rule.rows is not None and size[1:] == expected[1:] and 0 <= size[0] - expected[0] < PADDING
            if size != expected and not padded:
                raise UserError(
                    f"{key.key}: shape {list(size)} in the checkpoint, {list(expected)} by the rule of {rule.megatron}"
                )
            stored, whole = sum(prod(chunk.sizes) for chunk in self._chunks[key.key, key.at]), prod(size[len(key.at) :])
            if stored != whole:
                raise UserError(f"{self.weights}: {rule.megatron}: {stored} of {whole} values are stored")
        for name, facts in self._facts.items():
            check_tiled(self.weights, name, facts)
        for name, end in self._ends().items():
            file = self.weights / name
            if not file.is_file() or file.stat().st_size < end:
                raise UserError(f"{file}: is truncated" if file.is_file() else f"{file}: is missing")

    def dtype(self, rule: Rule) -> torch.dtype:
        return self._facts[self._find(self._own[rule.hf]).key].properties.dtype

    def parts(self, rule: Rule) -> dict[str, Values]:
        own = self._own[rule.hf]
        full = self._read(self._find(own))
        return parts_of(own if own.rows is None else replace(own, rows=len(full)), [full])

    def files(self) -> list[Path]:
        return [self.weights / name for name in sorted(self._ends())]

    def _find(self, rule: Rule) -> Key:
        keys = stored_keys(rule, self.model)
        for key in keys:
            if key.key in self._facts:
                return key
        raise UserError(f"{self.weights}: has no {keys[0].key}, the key of {rule.megatron}")

    def _read(self, key: Key) -> Tensor:
        """The tensor at `key.at`: described, or joined in memory if it is stored in several chunks."""
        n, facts = len(key.at), self._facts[key.key]
        full = None
        for chunk in self._chunks[key.key, key.at]:
            place = self.weights / chunk.file, chunk.start, chunk.length
            stored = read_tensor(*place, chunk.sizes, facts.properties.dtype).reshape(chunk.sizes[n:])
            if stored.shape == facts.size[n:]:
                return stored
            if full is None:
                full = torch.empty(facts.size[n:], dtype=facts.properties.dtype)
            rows = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[n:], chunk.sizes[n:], strict=True))
            read(stored, full[rows])
        assert full is not None, "check_whole counts the values of every key"
        return full

    def _ends(self) -> dict[str, int]:
        """File → where the last chunk in it ends."""
        ends: dict[str, int] = defaultdict(int)
        for chunks in self._chunks.values():
            for chunk in chunks:
                ends[chunk.file] = max(ends[chunk.file], chunk.start + chunk.length)
        return ends

    def _read_metadata(self, leading: Mapping[str, int]) -> None:
        """Fill `_facts` and `_chunks` for the keys in `leading` (key → number of leading dimensions)."""
        metadata = load_metadata(self.weights / ".metadata")
        sizes: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
        for key, facts in metadata.state_dict_metadata.items():
            if key in leading and isinstance(facts, TensorStorageMetadata):
                self._facts[key] = facts
                sizes |= {(key, tuple(chunk.offsets)): tuple(chunk.sizes) for chunk in facts.chunks}
        for index, info in metadata.storage_data.items():
            if index.fqn not in self._facts:
                continue
            offsets, n = tuple(index.offset), leading[index.fqn]
            chunk = Chunk(offsets, sizes[index.fqn, offsets], info.relative_path, info.offset, info.length)
            if any(size != 1 for size in chunk.sizes[:n]):
                raise UserError(
                    f"{self.weights}: {index.fqn}: a chunk spans several layers; Megatron stores one per layer"
                )
            self._chunks[index.fqn, offsets[:n]].append(chunk)


class TorchDistWriter:
    """Writes what `megatron.core.dist_checkpointing.load` reads: one file per unit, then the metadata.

    The destination is what Megatron-LM's `--load` expects: a tracker file, and the weights in `release/`.
    """

    def __init__(self, model: ModelShape) -> None:
        self.model = model
        self.settings: dict[str, Any] = {"format": "torch_dist"}

    def rules(self) -> list[Rule]:
        return [rule for rule in rules(self.model) if not rule.copy]

    def nbytes(self, units: Iterable[Unit]) -> int:
        return sum(unit.nbytes + OVERHEAD * len(unit.rules) for unit in units)

    def lay_out(self, folder: Path, units: list[Unit]) -> None:
        self.folder = folder / RELEASE
        self.folder.mkdir(exist_ok=True)
        self._archives = ArchiveWriter(self.folder)
        known: dict[str, tuple[torch.dtype, str]] = {}
        for rule, dtype in (item for unit in units for item in unit.items()):
            key = stored_keys(rule, self.model)[0].key
            first, where = known.setdefault(key, (dtype, rule.megatron))
            if dtype != first:
                raise UserError(
                    f"{rule.megatron}: is {dtype} but {where} is {first}, and both are stored in {key}; "
                    "choose one type with --dtype"
                )

    def write(self, unit: Unit, tensors: Iterable[tuple[Rule, Mapping[str, Values]]]) -> list:
        record: list = []
        name, end = f"__{unit.index}_0.distcp", 0
        with open(self.folder / name, "wb", buffering=0) as file:
            for (rule, parts), dtype in zip(tensors, unit.dtypes, strict=True):
                start = -(-end // ALIGNMENT) * ALIGNMENT
                leading = len(stored_keys(rule, self.model)[0].at)
                blocks = rule.blocks({name: in_one_piece(part) for name, part in parts.items()})
                end = self._archives.write(file.fileno(), start, (*(1,) * leading, *rule.shape()), blocks)
                record.append([rule.megatron, NAMES[dtype], name, start, end - start])
            os.fdatasync(file.fileno())  # now, while other threads read
        return record

    def finish(self, units: list[Unit], records: Mapping[int, list]) -> None:
        metadata = Metadata({}, {}, {}, StorageMeta(), CURRENT_DCP_VERSION)
        by_name = {rule.megatron: rule for unit in units for rule in unit.rules}
        for unit in units:
            for megatron, *facts in records[unit.index]:
                self._describe(metadata, by_name[megatron], *facts)
        self._write_extra_states(metadata, by_name.values())
        with open(self.folder / ".metadata", "wb") as file:
            pickle.dump(metadata, file)
        common = {"args": megatron_arguments(self.model, Layout(), self.model.vocab)}
        torch.save(common | {"checkpoint_version": 3.0, "iteration": 0}, self.folder / "common.pt")
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        config = backends | {f"{name}_version": 1 for name in backends}
        (self.folder / "metadata.json").write_text(json.dumps(config))
        (self.folder.parent / TRACKER).write_text(RELEASE)

    def close(self) -> None:
        """Files are closed as they are written."""

    def _describe(self, metadata: Metadata, rule: Rule, dtype: str, file: str, start: int, length: int) -> None:
        """Add `rule`'s tensor as one chunk."""
        shape = rule.shape()
        for key, at, of in stored_keys(rule, self.model):
            if len(of) < (rule.layer is not None) + (rule.expert is not None):
                continue  # stacked keys only
            whole = TensorStorageMetadata(TensorProperties(DTYPES[dtype]), torch.Size((*of, *shape)), [])
            chunks = metadata.state_dict_metadata.setdefault(key, whole).chunks  # type: ignore[union-attr]
            offsets = torch.Size((*at, *(0 for _ in shape)))
            chunks.append(ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in at), *shape))))
            metadata.storage_data[MetadataIndex(key, offsets, len(chunks) - 1)] = _StorageInfo(file, start, length)

    def _write_extra_states(self, metadata: Metadata, rules: Iterable[Rule]) -> None:
        """Store "none" for every module that may have quantisation state, because it reads it when loading."""
        file = "__extra_states_0.distcp"
        torch.save([None], self.folder / file)
        info = _StorageInfo(file, 0, (self.folder / file).stat().st_size)
        for rule in rules:
            key, at, of = stored_keys(rule, self.model)[0]
            modules = [key.rpartition(".")[0]]
            if key.endswith("self_attention.linear_proj.weight"):
                modules.append(key.replace("linear_proj.weight", "core_attention"))
            for module in modules:
                index, sizes = ".".join(map(str, at or (0,))), ".".join(map(str, of or (1,)))
                name = f"{module}._extra_state/shard_{index}_{sizes}"
                metadata.state_dict_metadata[name] = BytesStorageMetadata()
                metadata.storage_data[MetadataIndex(name)] = info


def torch_dist_folder(path: Path) -> Path | None:
    """The folder of the torch_dist checkpoint at or under `path`, if there is one."""
    return next((folder for folder in megatron_folders(path) if (folder / ".metadata").is_file()), None)
