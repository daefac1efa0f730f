"""Megatron's classic checkpoint: one `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` for each rank of a layout."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints_conv.checkpoint import RELEASE, TRACKER, megatron_arguments, megatron_folders, parts_of
from checkpoints_conv.unit import Unit
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.archive import read_archive, start_of
from megarl.models.files.regular import short
from megarl.models.files.tensor_io import Values, bands, in_one_piece, pwrite, tensor_bytes
from megarl.models.layout import Layout, chunks, local_rules, padded_vocab
from megarl.models.rules import Rule, Spec
from megarl.models.shape import ModelShape

FILE = "model_optim_rng.pt"
FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
EMBEDDING = "embedding.word_embeddings.weight"


class Rank(NamedTuple):
    tp: int
    pp: int
    ep: int


class Place(NamedTuple):
    """Where a shard is: the rank's file, the model chunk, the local name."""

    rank: Rank
    chunk: str
    name: str


def places(every: Iterable[Rule], model: ModelShape, layout: Layout) -> dict[str, list[list[Place]]]:
    """Megatron name → for each shard, in order, every place that has it. A replicated tensor has one shard."""
    every = list(every)
    found: dict[str, list[list[Place]]] = {}
    for chunk in chunks(model, layout):
        key = "model" if layout.vpp == 1 else f"model{chunk.index}"
        for ep_rank in range(layout.ep):
            for name, rule in local_rules(every, model, layout, chunk.pp_rank, chunk.index, ep_rank).items():
                shards = 1 if rule.partition is None else layout.tp
                held = found.setdefault(rule.megatron, [[] for _ in range(shards)])
                for tp_rank in range(layout.tp):
                    held[tp_rank % shards].append(Place(Rank(tp_rank, chunk.pp_rank, ep_rank), key, name))
    return found


class Classic:
    """The model weights of a classic checkpoint, joined from the files of all ranks (a `Checkpoint`).

    The files tell layout and layer spec. Opening reads only the tensors' descriptions, and unpickles only tensors and
    arguments. A tensor's values are read when needed.
    """

    format = "Megatron classic"

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder = config if config.is_dir() else config.parent
        self.model = read_shape(config)
        self._paths, numbers = _rank_files(folder)
        loaded = [_chunks(path) for path in self._paths]
        first = loaded[0]
        self.layout, ranks = _layout(folder, numbers, first, self.model)
        self._files = dict(zip(ranks, zip(self._paths, loaded, strict=True), strict=True))
        spec: Spec = "te" if any("linear_qkv.layer_norm_weight" in name for name in first[min(first)]) else "local"
        if EMBEDDING not in first[min(first)] or first[min(first)][EMBEDDING].dim() != 2:
            raise UserError(f"{self._paths[0]}: has no {EMBEDDING}")
        self._every = rules(self.model, spec, len(first[min(first)][EMBEDDING]) * self.layout.tp)
        self._places = places(self._every, self.model, self.layout)
        self._own = {rule.hf: rule for rule in self._every if not rule.copy}

    def check_whole(self) -> None:
        expected: dict[Rank, dict[tuple[str, str], Rule]] = defaultdict(dict)
        for rule in self._every:
            for place in (place for shard in self._places.get(rule.megatron, []) for place in shard):
                expected[place.rank][place.chunk, place.name] = rule
        for rank, (path, states) in self._files.items():
            found = {(chunk, name): value for chunk, state in states.items() for name, value in state.items()}
            for (chunk, name), rule in expected[rank].items():
                if (chunk, name) not in found:
                    raise UserError(f"{path}: {chunk} has no {name}")
                shape, wanted = list(found[chunk, name].shape), list(rule.shape(self.layout.shards(rule)))
                if shape != wanted:
                    raise UserError(f"{path}: {name}: shape {shape}, {wanted} by the rule of {rule.megatron}")
            extra = found.keys() - expected[rank].keys()
            if extra:
                raise UserError(f"{path}: {short(min(extra)[1])}: no rule of the map covers this tensor")

    def dtype(self, rule: Rule) -> torch.dtype:
        return self._shards(rule)[0].dtype

    def parts(self, rule: Rule) -> dict[str, Values]:
        own = self._own[rule.hf]
        return parts_of(own, self._shards(rule))

    def files(self) -> list[Path]:
        return self._paths

    def _shards(self, rule: Rule) -> list[Tensor]:
        held = [shard[0] for shard in self._places[self._own[rule.hf].megatron]]
        return [self._files[place.rank][1][place.chunk][place.name] for place in held]


class ClassicWriter:
    """Writes the files of all ranks of `layout`, each tensor directly to its places in them."""

    def __init__(self, model: ModelShape, layout: Layout, spec: Spec = "te", divisible_by: int = 128) -> None:
        layout.check(model)
        if layout.expert_tp != layout.tp:
            raise UserError(
                f"etp: {layout.etp}: classic checkpoints need etp = tp = {layout.tp}; use torch-dist instead"
            )
        self.model, self.layout = model, layout
        self._every = rules(model, spec, padded_vocab(model.vocab, layout.tp, divisible_by))
        self._places = places(self._every, model, layout)
        self.settings = {"format": "classic", "layout": repr(layout), "spec": spec, "divisible_by": divisible_by}

    def rules(self) -> list[Rule]:
        return [rule for rule in self._every if rule.megatron in self._places]

    def nbytes(self, units: Iterable[Unit]) -> int:
        total = 0
        for rule, dtype in (item for unit in units for item in unit.items()):
            copies = sum(map(len, self._places[rule.megatron]))
            total += copies * torch.Size(rule.shape(self.layout.shards(rule))).numel() * dtype.itemsize
        return total

    def lay_out(self, folder: Path, units: list[Unit]) -> None:
        """Create each rank's file in its final size, with holes for the tensors, and note where the holes are."""
        self._folder = folder
        states: dict[Rank, dict[str, Any]] = {rank: {} for rank in _ranks(self.layout)}
        for rule, dtype in (item for unit in units for item in unit.items()):
            # Never written to, so it takes no memory.
            shape = rule.shape(self.layout.shards(rule))
            for place in (place for shard in self._places[rule.megatron] for place in shard):
                states[place.rank].setdefault(place.chunk, {})[place.name] = torch.empty(shape, dtype=dtype)
        arguments = megatron_arguments(self.model, self.layout, self._every[0].shape()[0])
        self._fds, self._starts = {}, {}
        for rank, state in states.items():
            path = folder / RELEASE / _folder_name(self.layout, rank) / FILE
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".partial")
                with torch.serialization.skip_data():
                    torch.save({**state, "args": arguments, "checkpoint_version": 3.0, "iteration": 0}, partial)
                partial.rename(path)
            self._fds[rank] = os.open(path, os.O_WRONLY)
            for chunk, tensors in _chunks(path).items():
                for name, tensor in tensors.items():
                    self._starts[Place(rank, chunk, name)] = start_of(tensor)

    def write(self, unit: Unit, tensors: Iterable[tuple[Rule, Mapping[str, Values]]]) -> list:
        touched: set[Rank] = set()
        for rule, values in tensors:
            parts = {name: in_one_piece(part) for name, part in values.items()}
            shards = self._places[rule.megatron]
            if rule.partition == 1:
                self._write_columns(shards, *parts.values())
            else:
                self._write_rows(shards, rule, parts)
            touched.update(place.rank for held in shards for place in held)
        for rank in touched:
            os.fdatasync(self._fds[rank])  # now, while other threads read
        return []

    def _write_rows(self, shards: list[list[Place]], rule: Rule, parts: Mapping[str, Tensor]) -> None:
        for number, held in enumerate(shards):
            pieces = {name: parts[name][index] for name, index in rule.slices(number, len(shards)).items()}
            offset = 0  # of the shard's rows; padding stays a hole in the file, which reads as zeros
            for block in rule.blocks(pieces, len(shards)):
                for band in bands(block):
                    offset = self._write_at(held, band, offset)

    def _write_columns(self, shards: list[list[Place]], part: Tensor) -> None:
        """Each band of rows is read once and written to all shards."""
        offset = 0
        for band in bands(part):
            for held, columns in zip(shards, band.chunk(len(shards), 1), strict=True):
                end = self._write_at(held, columns, offset)
            offset = end

    def _write_at(self, held: list[Place], values: Tensor, offset: int) -> int:
        data = tensor_bytes(values)
        for place in held:
            pwrite(self._fds[place.rank], data, self._starts[place] + offset)
        return offset + len(data)

    def finish(self, units: list[Unit], records: Mapping[int, list]) -> None:
        (self._folder / TRACKER).write_text(RELEASE)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def classic_folder(path: Path) -> Path | None:
    """The folder of the classic checkpoint at or under `path`, if there is one."""
    return next((folder for folder in megatron_folders(path) if any(folder.glob(f"mp_rank_*/{FILE}"))), None)


def _ranks(layout: Layout) -> list[Rank]:
    return [Rank(*rank) for rank in product(range(layout.tp), range(layout.pp), range(layout.ep))]


def _folder_name(layout: Layout, rank: Rank) -> str:
    name = f"mp_rank_{rank.tp:02d}"
    name += f"_{rank.pp:03d}" if layout.pp > 1 else ""
    return name + (f"_{rank.ep:03d}" if layout.ep > 1 else "")


def _rank_files(folder: Path) -> tuple[list[Path], list[list[int]]]:
    """Each rank's file, and the numbers in its folder's name."""
    found = sorted((path, FOLDER.fullmatch(path.parent.name)) for path in folder.glob(f"mp_rank_*/{FILE}"))
    odd = next((path for path, match in found if match is None), None)
    if odd is not None:
        raise UserError(f"{odd.parent}: is not named like a rank's folder (mp_rank_TT, _PPP, _EEE)")
    return [path for path, _ in found], [[int(n) for n in match.groups() if n] for _, match in found if match]


def _layout(
    folder: Path, numbers: list[list[int]], states: Mapping[str, Mapping[str, Tensor]], model: ModelShape
) -> tuple[Layout, list[Rank]]:
    """The layout, from the files' numbers and the first file's layers; and the rank of each file."""
    if len({len(n) for n in numbers}) > 1:
        raise UserError(f"{folder}: has files of several layouts")
    layers = sum(
        len({name.split(".")[2] for name in state if name.startswith("decoder.layers.")}) for state in states.values()
    )
    if not states or not layers or model.layers % layers:
        raise UserError(f"{folder}: has {layers} layers in its first file; config.json has {model.layers}")
    pp = model.layers // layers
    expected = 1 + (pp > 1) + (len(numbers[0]) - 1 - (pp > 1) == 1)
    if len(numbers[0]) != expected:
        raise UserError(f"{folder}: {len(numbers[0])} numbers in the folders' names do not fit {pp} pipeline stages")
    ranks = [Rank(n[0], n[1] if pp > 1 else 0, n[-1] if len(n) > 1 + (pp > 1) else 0) for n in numbers]
    layout = Layout(1 + max(rank.tp for rank in ranks), pp, len(states), 1 + max(rank.ep for rank in ranks))
    needed = layout.tp * layout.pp * layout.ep
    if len(ranks) < needed:
        missing = next(
            rank for rank in map(Rank._make, product(*map(range, (layout.tp, pp, layout.ep)))) if rank not in ranks
        )
        raise UserError(f"{folder}: the file of rank {missing} is missing; {len(ranks)} of {needed} are there")
    layout.check(model)
    return layout, ranks


def _chunks(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dict of each model chunk in a rank's file, described, without quantisation states."""
    file = read_archive(path)
    if not isinstance(file, dict):
        raise UserError(f"{path}: has a {type(file).__name__}, not a mapping of model chunks")
    chunks = {}
    for key in sorted(key for key in file if isinstance(key, str) and re.fullmatch(r"model\d*", key) and file[key]):
        if not isinstance(file[key], dict):
            raise UserError(f"{path}: {key}: is a {type(file[key]).__name__}, not a mapping of tensors")
        chunks[key] = {name: value for name, value in file[key].items() if "_extra_state" not in str(name)}
        for name, value in chunks[key].items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise UserError(f"{path}: {key}: {short(repr(name))} is a {type(value).__name__}, not a tensor")
    return chunks
