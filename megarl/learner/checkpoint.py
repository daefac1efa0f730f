"""Checkpoints of the learner in Megatron's distributed format (torch_dist): saved under one layout, loaded under any.

A folder contains `learner.json`, which describes the learner, and Megatron's files. A folder without `learner.json`,
such as checkpoints_conv writes, has weights only.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megarl.errors import RunError, UserError
from megarl.learner.checkpoint_reader import LoadCommon, LoadSharded
from megarl.learner.learner import Learner
from megarl.learner.model import unwrap, vocabulary_rows
from megarl.learner.parallel import World
from megarl.models.files.regular import read_json, short
from megarl.models.shape import ModelShape

log = logging.getLogger(__name__)

MANIFEST = "learner.json"
PROBE = 2**20  # bytes
CUT_SHORT = "unexpected pos"  # what torch's writer of archives says when less was written than it asked
EXTRA_STATE = "_extra_state"  # Transformer Engine's FP8 history: rebuilt in a few steps, absent elsewhere


def save(learner: Learner, folder: Path) -> None:
    """Write weights, optimizer and version into `folder` (empty), loadable under any layout. Collective."""
    saving(learner, folder)()


def saving(learner: Learner, folder: Path, aside: World | None = None) -> Callable[[], None]:
    """Describe the learner's state in `folder`, an existing empty one; returns a function that writes the tensors.

    Both are collective. Without `settings.checkpoint.optimizer`, only the weights are saved. With `aside`, the tensors
    are copied now and a thread may write them; its ranks communicate over that group. RunError names the folder when
    the disk fails.
    """
    learner.finish_parameter_gather()
    writer = DeferredWriter(aside)
    with _writing(folder):
        state = _sharded(learner, learner.settings.checkpoint.optimizer, loading=False)
        dist_checkpointing.save(state, str(folder), writer)
        if learner.world.is_controller:
            (folder / MANIFEST).write_text(json.dumps(_manifest(learner), indent=1) + "\n")

    def write() -> None:
        with _writing(folder):
            writer.write()
        (aside or learner.world).barrier("the checkpoint's files")

    return write


def load(learner: Learner, folder: Path) -> None:
    """Restore what `save` wrote under any layout, or only weights. Collective.

    Raises UserError for a folder that is missing, truncated, or of another model.
    """
    manifest = _read_manifest(folder)
    if manifest is not None:
        _check(manifest, learner, folder)
    optimizer = bool(manifest and manifest["optimizer"])
    if optimizer:
        _allocate_state(learner)
    state = _sharded(learner, optimizer, loading=True)
    with _reading(folder):
        state, left, absent = dist_checkpointing.load(
            state, str(folder), LoadSharded(folder), LoadCommon(optimizer), strict=StrictHandling.RETURN_ALL
        )
    _complain(folder, [key for key in absent if EXTRA_STATE not in key], "is missing")
    ignored = (EXTRA_STATE,) if optimizer or manifest is None else (EXTRA_STATE, "optimizer.")
    if manifest is not None:
        _complain(folder, [key for key in left if not any(part in key for part in ignored)], "is not in this model")
    for name, model in zip(_names(learner), learner.models, strict=True):
        module = unwrap(model)
        weights = state[name] | {key: None for key in module.state_dict() if key.endswith(EXTRA_STATE)}
        module.load_state_dict(weights, strict=True)
    if optimizer:
        with _reading(folder):
            _restore_optimizer(learner, state["optimizer"])
    else:
        learner.optimizer.reload_model_params()
        if manifest and learner.world.is_controller:
            log.warning("%s has no optimizer state (checkpoint.optimizer: false): Adam starts from zero", folder)
    learner.version = manifest["updates"] if manifest else 0


class DeferredWriter(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist format. `save` takes the tensors, and copies them if training goes on; `write` writes them.

    The calling process writes. Megatron's writer would start a manager process and fork others, and a rank that ends
    early leaves them behind.
    """

    def __init__(self, aside: World | None) -> None:
        super().__init__("torch_dist", 1)
        self._aside = aside

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        if self._aside is not None:
            for part in (part for parts in tensors.values() for part in parts):
                held = part.data
                part.data = held.detach().to("cpu", copy=True) if isinstance(held, Tensor) else deepcopy(held)
        self._state, self._folder = mcore_to_pyt_state_dict(tensors, False), checkpoint_dir

    def write(self) -> None:
        dcp.save(
            self._state,
            storage_writer=dcp.FileSystemWriter(self._folder, single_file_per_rank=True, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=self._aside and self._aside.control,
        )


def _sharded(learner: Learner, optimizer: bool, loading: bool) -> dict[str, Any]:
    """Megatron's description of this rank's part of the whole state."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {}
    for name, model in zip(_names(learner), learner.models, strict=True):
        tensors = unwrap(model).sharded_state_dict(metadata=metadata)
        state[name] = {key: value for key, value in tensors.items() if EXTRA_STATE not in key}
    if optimizer:
        state["optimizer"] = learner.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
    return state


def _names(learner: Learner) -> list[str]:
    """Names of the model chunks, as Megatron's optimizers expect them."""
    return ["model"] if len(learner.models) == 1 else [f"model{i}" for i in range(len(learner.models))]


def _allocate_state(learner: Learner) -> None:
    """Create AdamW's state, which torch creates at the first step only and Megatron needs for loading."""
    for optimizer in learner.optimizer.chained_optimizers:
        if hasattr(optimizer, "_init_optimizer_states_with_dummy_values") and not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()


def _restore_optimizer(learner: Learner, state: Any) -> None:
    chained = learner.optimizer.chained_optimizers
    states = [state] if len(chained) == 1 else [state[i] for i in range(len(chained))]
    for optimizer, own in zip(chained, states, strict=True):
        parameters = own.pop("param_state", None)
        optimizer.load_state_dict(own)
        inner = optimizer.optimizer.state
        # Megatron gives all parameters one `step` tensor, which each of them then increments. Adam's bias correction
        # would run too fast by the number of parameters. Its reshardable format has no `step` at all.
        steps = {key: held.pop("step").clone() for key, held in inner.items() if "step" in held}
        if parameters is not None:
            optimizer.load_parameter_state_from_fully_reshardable(parameters)
        for key, step in steps.items():
            inner[key]["step"] = step


def _manifest(learner: Learner) -> dict[str, Any]:
    return {
        "model": asdict(learner.shape),
        "updates": learner.version,
        "optimizer": learner.settings.checkpoint.optimizer,
        "distributed_optimizer": learner.settings.parallel.distributed_optimizer,
        "dtype": learner.settings.precision.dtype,
        "vocabulary_rows": vocabulary_rows(learner.shape, learner.settings.parallel.tp),
    }


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    if not (folder / "metadata.json").is_file():
        raise UserError(f"checkpoint: {folder} is not a whole checkpoint (no metadata.json)")
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    kinds = {"model": dict, "updates": int, "optimizer": bool, "distributed_optimizer": bool, "dtype": str}
    for key, kind in (kinds | {"vocabulary_rows": int}).items():
        if not isinstance(manifest, dict) or type(manifest.get(key)) is not kind:
            raise UserError(f"checkpoint: {folder / MANIFEST}: {key} is missing or no {kind.__name__}")
    return manifest


def _check(manifest: dict[str, Any], learner: Learner, folder: Path) -> None:
    """Raise UserError if the checkpoint is of another model, or its optimizer state cannot be used."""
    saved, here = manifest["model"], json.loads(json.dumps(asdict(learner.shape)))
    for name in ModelShape.__dataclass_fields__:
        if name != "max_positions" and saved.get(name) != here[name]:
            raise UserError(
                f"checkpoint: {folder} has another architecture: its {name} is {saved.get(name)}, that of "
                f"{learner.settings.model.path} is {here[name]}"
            )
    if not manifest["optimizer"]:
        return
    settings = learner.settings
    if manifest["distributed_optimizer"] != settings.parallel.distributed_optimizer:
        saved_as = str(manifest["distributed_optimizer"]).lower()
        raise UserError(f"parallel.distributed_optimizer: the checkpoint in {folder} was saved with {saved_as}")
    if (manifest["dtype"] == "fp32") != (settings.precision.dtype == "fp32"):
        raise UserError(f"precision.dtype: the checkpoint in {folder} was saved with {manifest['dtype']}")
    rows = vocabulary_rows(learner.shape, settings.parallel.tp)
    if manifest["vocabulary_rows"] != rows:
        raise UserError(
            f"parallel.tp: {settings.parallel.tp} pads the vocabulary to {rows} rows; the optimizer's state in "
            f"{folder} has {manifest['vocabulary_rows']}"
        )


def _complain(folder: Path, keys: list[str], what: str) -> None:
    if keys:
        more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        raise UserError(f"checkpoint: {folder}: {sorted(keys)[0]} {what}{more}")


@contextmanager
def _writing(folder: Path):
    """Whatever fails in the body is a RunError that names the folder; a full disk is called so."""
    try:
        yield
    except RunError:
        raise
    except (Exception, CheckpointException) as e:  # torch's is none of Python's ordinary ones
        cause = _first_cause(e)
        if _no_room(cause, folder):
            raise RunError(f"checkpoint: {folder}: the disk is full, or a quota is reached") from None
        if CUT_SHORT in str(cause):  # and there is room again, since another rank gave up
            text = "a file was cut short, as when the disk is full"
            raise RunError(f"checkpoint: writing {folder} failed: {text}") from e
        raise RunError(f"checkpoint: writing {folder} failed: {_line(cause)}") from e


@contextmanager
def _reading(folder: Path):
    try:
        yield
    except RunError:
        raise
    except (
        Exception,
        CheckpointException,
    ) as e:  # of many kinds, because damage can be anywhere; torch's is no Exception
        raise UserError(f"checkpoint: {folder} is truncated or does not fit: {_line(_first_cause(e))}") from e


def _no_room(error: BaseException, folder: Path) -> bool:
    """Whether the disk is full: by the error, or, as torch's C++ writers hide its number, by trying."""
    if not isinstance(error, OSError):
        probe = folder / f".probe-{os.getpid()}"
        try:
            with probe.open("wb", buffering=0) as file:
                written = file.write(bytes(PROBE))
                os.fsync(file.fileno())
            return written < PROBE
        except OSError as e:
            error = e
        finally:
            with suppress(OSError):
                probe.unlink()
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _first_cause(error: BaseException) -> BaseException:
    """The error behind torch's collective report, or behind Python's exception chain."""
    if isinstance(error, CheckpointException):
        causes = [_first_cause(failure[0]) for failure in error.failures.values()]
        return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
    return _first_cause(error.__context__) if isinstance(error.__context__, OSError) else error


def _line(error: BaseException) -> str:
    return short(error) or type(error).__name__
