"""The files of a model folder beside its weights: configuration, tokenizer, chat templates, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}
TEMPLATES = "additional_chat_templates"  # transformers' folder of a tokenizer's further templates
SMALL = 64 * 2**20  # bytes; larger files beside the weights are not configuration


def copy_companions(source: Path, folder: Path) -> None:
    """Copy them to `folder`, which exists."""
    for file in _companions(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Write the weights' type to config.json: libraries load weights in that type, not in their own."""
    values = json.loads(config.read_text())
    key = "dtype" if "dtype" in values else "torch_dtype"  # transformers 5 and 4
    if key == "dtype":
        values.pop("torch_dtype", None)
    values[key] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(values, indent=2) + "\n")


def _companions(source: Path) -> Iterator[Path]:
    for file in sorted([*source.iterdir(), *(source / TEMPLATES).glob("*.jinja")]):
        weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json") or file.name.startswith(".")
        tracker = file.name == "latest_checkpointed_iteration.txt"
        if file.is_file() and not weights and not tracker and file.stat().st_size <= SMALL:
            yield file
