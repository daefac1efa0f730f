"""Reads Megarl's and Megatron's torch_dist folders for the learner: as data, whoever wrote them.

Megatron's own strategies unpickle `.metadata` and what is beside it as programs. Here every pickle goes through
`models.files`, which runs nothing, and every tensor must have the type and shape that `.metadata` gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from megarl.errors import UserError
from megarl.models.files.archive import read_archive, read_tensor
from megarl.models.files.tensor_io import loaded
from megarl.models.files.torch_metadata import check_tiled, load_metadata


class Reader(dcp.FileSystemReader):
    """torch's reader of a folder, given the checked metadata; only tensors can be read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder, self._metadata = folder, load_metadata(folder / ".metadata")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for key in {item.storage_index.fqn for item in plan.items}:
            check_tiled(self._folder, key, self._facts(key))
        for item in plan.items:
            facts, info = self._facts(item.storage_index.fqn), self.storage_data[item.storage_index]
            sizes = next(c.sizes for c in facts.chunks if c.offsets == item.storage_index.offset)
            stored = read_tensor(
                self._folder / info.relative_path, info.offset, info.length, sizes, facts.properties.dtype
            )
            target = planner.resolve_tensor(item).detach()
            target.copy_(loaded(narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _facts(self, key: str) -> TensorStorageMetadata:
        facts = self._metadata.state_dict_metadata.get(key)
        if not isinstance(facts, TensorStorageMetadata):
            raise UserError(f"{self._folder}: {key} is not a tensor")
        return facts


class LoadSharded(TorchDistLoadShardedStrategy):
    """Megatron's loading of tensors, through `Reader`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._reader = Reader(folder)

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        tensors, flat, renamed = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        state = mcore_to_pyt_state_dict(tensors, True)
        every = [part for part in nested_values(sharded_state_dict) if isinstance(part, ShardedTensor)]
        planner = MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[part for part in every if not part.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={part.key: part for part in every if part.allow_shape_mismatch},
        )
        dcp.load(state, storage_reader=self._reader, planner=planner)
        read = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
        restored = _replace_sharded_keys_with_state_dict_keys(read, flat, renamed)
        _restore_dict_types(restored, sharded_state_dict)
        return restored

    def load_tensors_metadata(self, checkpoint_dir: Path, metadata: Metadata | None = None) -> Any:
        return super().load_tensors_metadata(checkpoint_dir, self._reader.read_metadata())

    def load_sharded_metadata(self, checkpoint_dir: Path) -> Any:
        """Of the tensors: the learner asks for nothing else."""
        return self.load_tensors_metadata(checkpoint_dir)


class LoadCommon(TorchCommonLoadStrategy):
    """The optimizer's settings and counters. Without `optimizer` there is nothing to read: weights are tensors."""

    def __init__(self, optimizer: bool) -> None:
        self._optimizer = optimizer

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        return read_common(Path(checkpoint_dir)) if self._optimizer else {}


def read_common(folder: Path) -> dict[str, Any]:
    """What `common.pt` has, tensors loaded. UserError unless it is a mapping."""
    common = read_archive(folder / COMMON_STATE_FNAME)
    if not isinstance(common, dict):
        raise UserError(f"{folder / COMMON_STATE_FNAME}: has a {type(common).__name__}, not a mapping")
    return dict_list_map_inplace(lambda value: loaded(value) if isinstance(value, Tensor) else value, common)
