"""Model folders to convert, and what to do with them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_conv.convert import convert, plan
from checkpoints_conv.formats import open_checkpoint
from checkpoints_conv.unit import Writer
from tests.support.tiny_models import config as tiny_config
from tests.support.tiny_models import tiny, weights


def write_model(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, files: int = 1, **sizes) -> Path:
    """A model folder as the hub has it: config, tokenizer files, one or several weight files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(family, torch_dtype="bfloat16", **sizes)))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    tensors = weights(tiny(family, **sizes), dtype)
    names = list(tensors)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def convert_folder(
    source: Path,
    destination: Path,
    writer: Writer,
    dtype: torch.dtype | None = None,
    config: Path | None = None,
    **options,
) -> int:
    """Convert, whatever the source's format."""
    return convert(plan(open_checkpoint(source, config), writer, destination, dtype), **options)


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bytes(a: Path, b: Path) -> None:
    before, after = read_all(a), read_all(b)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.shape == after[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
