"""The metadata of a torch_dist checkpoint: a pickle of others, read as data and checked before anybody uses it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megarl.errors import UserError
from megarl.models.files import pickled
from megarl.models.files.pickled import Maker, Record, records
from megarl.models.files.regular import contents, short

LIMIT = 2**30  # bytes
_KNOWN = {
    **pickled.DTYPES,
    ("torch", "Size"): Maker(pickled.size),
    ("torch.serialization", "_get_layout"): Maker(str),
    **records("pathlib", "PosixPath"),
    **records("pathlib._local", "PosixPath"),
    **records(
        "torch.distributed.checkpoint.metadata",
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    **records("torch.distributed.checkpoint.filesystem", "_StorageInfo", "_StoragePrefix"),
    # What a saver keeps for itself: its save plans.
    **records(
        "torch.distributed.checkpoint.planner",
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    ),
    **records("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata", "MCoreSavePlan"),
}  # fmt: skip


def load_metadata(file: Path) -> Metadata:
    """Read a `.metadata` file. Every key, size, file name and byte range in it is checked; save plans are left out.

    Raises UserError for a pickle that names anything else than a checkpoint's description, and for a damaged one.
    """
    try:
        return _metadata(pickled.load(contents(file, LIMIT), _KNOWN))
    except UserError:
        raise
    except Exception as e:  # of many kinds, because damage can be anywhere
        raise UserError(
            f"{file}: not the metadata of a torch_dist checkpoint ({short(e) or type(e).__name__})"
        ) from None


def check_tiled(folder: Path, key: str, facts: TensorStorageMetadata) -> None:
    """Raise UserError unless each value of the tensor stands in one chunk: none is missing, none stands twice."""
    stored, whole = sum(chunk.sizes.numel() for chunk in facts.chunks), facts.size.numel()
    if stored != whole:
        raise UserError(f"{folder}: {short(key)}: {stored} of {whole} values are stored")
    if not _disjoint([(c.offsets, c.sizes) for c in facts.chunks if c.sizes.numel()]):
        raise UserError(f"{folder}: {short(key)}: some of its values are stored twice")


Box = tuple[torch.Size, torch.Size]  # offsets and sizes


def _disjoint(boxes: list[Box], dim: int = 0) -> bool:
    """Whether no two boxes that overlap in all dimensions before `dim` do so in `dim` and those after it."""
    if len(boxes) < 2:
        return True
    if dim == len(boxes[0][0]):
        return False
    runs: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box[0][dim]):
        if box[0][dim] >= end:
            runs.append([])
        runs[-1].append(box)
        end = max(end, box[0][dim] + box[1][dim])
    return all(
        # Grids, as Megatron saves, go on here; in a chain two boxes of a run need not overlap.
        _disjoint(run, dim + 1)
        if len({(o[dim], s[dim]) for o, s in run}) == 1
        else not any(_overlap(a, b) for a, b in combinations(run, 2))
        for run in runs
    )


def _overlap(a: Box, b: Box) -> bool:
    return all(o < p + t and p < o + s for o, s, p, t in zip(*a, *b, strict=True))


def _metadata(value: Any) -> Metadata:
    whole = _fields(value, "Metadata", "MCoreMetadata")  # Megatron's own until 0.15
    described = {_text(key): _described(key, facts) for key, facts in whole["state_dict_metadata"].items()}
    tensors = {key: facts for key, facts in described.items() if isinstance(facts, TensorStorageMetadata)}
    offsets = {key: {chunk.offsets for chunk in facts.chunks} for key, facts in tensors.items()}
    stored = {}
    for place, info in whole["storage_data"].items():
        index = _index(place)
        if index.fqn not in described or (index.fqn in tensors and index.offset not in offsets[index.fqn]):
            raise ValueError(f"{index.fqn} is stored but not described")
        stored[index] = _info(info)
    version = whole.get("version")
    return Metadata(described, None, stored, StorageMeta(), version if isinstance(version, str) else None)


def _described(key: str, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, Record) and value.kind == "BytesStorageMetadata":
        return BytesStorageMetadata()
    facts = _fields(value, "TensorStorageMetadata")
    properties = facts["properties"]
    if not isinstance(properties, Record) or properties.kind != "TensorProperties":
        raise ValueError(f"{key} has no properties")
    dtype, shape = properties.state[0], _size(facts["size"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has no type")
    chunks = []
    for each in facts["chunks"]:
        chunk = _fields(each, "ChunkStorageMetadata")
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"{key}: a chunk has other dimensions than the tensor")
        if any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{key}: a chunk lies outside the tensor")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype), shape, chunks)


def _index(value: Any) -> MetadataIndex:
    place = _fields(value, "MetadataIndex")
    offset, number = place.get("offset"), place.get("index")
    if number is not None and type(number) is not int:
        raise ValueError(f"{place['fqn']} has no number")
    return MetadataIndex(_text(place["fqn"]), None if offset is None else _size(offset), number)


def _info(value: Any) -> _StorageInfo:
    info = _fields(value, "_StorageInfo")
    name, offset, length = _text(info["relative_path"]), info["offset"], info["length"]
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a file of this folder")
    if not all(type(number) is int and 0 <= number < 2**62 for number in (offset, length)):
        raise ValueError(f"{name}: a tensor is not at a byte of it")
    if info.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed or encrypted, which Megatron does to nothing")
    return _StorageInfo(name, offset, length)


def _fields(value: Any, *kinds: str) -> dict[str, Any]:
    if not isinstance(value, Record) or value.kind not in kinds or not isinstance(value.state, dict):
        raise ValueError(f"a {kinds[0]} is missing")
    return value.state


def _size(value: Any) -> torch.Size:
    if not isinstance(value, torch.Size):
        raise ValueError("a size is missing")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is missing")
    if not value.isprintable():
        raise ValueError(f"{value!r} is not a name")
    return value
