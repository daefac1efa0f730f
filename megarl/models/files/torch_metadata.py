"""The metadata of a torch_dist checkpoint, unpickled with only the classes that describe one."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megarl.errors import UserError


def load_metadata(file: Path) -> Metadata:
    """Read a `.metadata` file. It is a pickle: only classes that describe a checkpoint are allowed."""
    try:
        with open(file, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as e:
        raise UserError(f"{file}: not the metadata of a torch_dist checkpoint ({e})") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise UserError(f"{file}: not the metadata of a torch_dist checkpoint")
    return metadata


class _Inert:
    """Replaces what a saver keeps in the metadata for itself: its save plans."""

    def __init__(self, *_: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...


class _MetadataUnpickler(pickle.Unpickler):
    INERT = "torch.distributed.checkpoint.", "megatron.core.dist_checkpointing."
    ALLOWED = {
        **{("torch.distributed.checkpoint.metadata", cls.__name__): cls for cls in (
            Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, TensorProperties,
            MetadataIndex, StorageMeta, _MEM_FORMAT_ENCODING,
        )},
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        ("torch", "Size"): torch.Size,
        ("pathlib", "PosixPath"): PurePosixPath,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith(self.INERT):
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
