"""Opens a checkpoint of any format."""

from __future__ import annotations

from pathlib import Path

from checkpoints_conv.checkpoint import LEARNER, Checkpoint
from checkpoints_conv.classic import Classic, classic_folder
from checkpoints_conv.torch_dist import TorchDist, torch_dist_folder
from megarl.config import load as load_settings
from megarl.errors import UserError
from megarl.models.files.hf import HfWeights


def open_checkpoint(path: Path, config: Path | None = None, allow_pickle: bool = False) -> Checkpoint:
    """Open a model folder or a Megatron checkpoint; the files tell which it is.

    `config`: config.json (or its folder) for a checkpoint that has none. A run's checkpoint needs none: its config.yaml
    names the first model. Pickled Hugging Face weights (`*.bin`) need `allow_pickle`; only tensors are unpickled.
    """
    if not path.exists():
        raise UserError(f"{path}: does not exist")
    if inner := torch_dist_folder(path):
        return TorchDist(inner, config or _config_above(inner))
    if inner := classic_folder(path):
        return Classic(inner, config or _config_above(inner))
    if config is not None:
        raise UserError(f"{path}: is no Megatron checkpoint (no .metadata, no mp_rank_00*), so config does not apply")
    return HfWeights(path, allow_pickle=allow_pickle)


def _config_above(folder: Path) -> Path:
    """The folder of config.json: the weights', the one above, or that of the run's first model."""
    for place in (folder, folder.parent):
        if (place / "config.json").is_file():
            return place
    *_, run = folder.absolute().parents[:3]  # RUN/checkpoints/step_NNNNNN/learner
    if folder.name == LEARNER and (run / "config.yaml").is_file():
        model = load_settings(run / "config.yaml").model.path
        if (model / "config.json").is_file():
            return model
        raise UserError(
            f"{run / 'config.yaml'}: model.path: {model} has no config.json, seen from {Path.cwd()}; "
            "go where the run was started, or name the model's folder with --config"
        )
    raise UserError(f"{folder}: has no config.json beside it; name the model's folder with --config")
