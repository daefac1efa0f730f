"""Memory does not grow with the model: conversion and loading hold a few layers' worth, however many there are."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from checkpoints_conv.classic import ClassicWriter
from checkpoints_conv.hf_writer import HfWriter
from checkpoints_conv.torch_dist import TorchDistWriter
from megarl.config import Parallel, Precision
from megarl.learner.model import build, transformer_config
from megarl.learner.parallel import start
from megarl.learner.weights import Weights
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.layout import Layout
from megarl.models.shape import ModelShape
from megarl.runtime.spawn import spawn
from tests.support.conversions import convert_folder, write_model

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "vocab_size": 2048, "head_dim": 64}
M_MMAP_THRESHOLD = -3  # of malloc.h
LAYERS = 2  # the bound, in bytes of the largest layer
WRITERS = {
    "torch_dist": ("hf", TorchDistWriter),
    "back": ("torch_dist", HfWriter),
    "classic": ("hf", lambda model: ClassicWriter(model, Layout(tp=2, pp=2))),
    "back from classic": ("classic", HfWriter),
}


def layer_bytes(shape: ModelShape) -> int:
    """Of a layer in float32; larger here than the embedding."""
    return sum(torch.Size(rule.shape()).numel() * 4 for rule in rules(shape) if rule.layer == 0)


def resident() -> tuple[int, int]:
    """Bytes resident now, and at most since `forget_peak`; pages of mapped files are among them."""
    status = Path("/proc/self/status").read_text()
    now, peak = (int(status.split(f"{key}:")[1].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return resident()[0]


def give_freed_memory_back() -> None:
    """Have glibc map every larger allocation by itself; it begins so, but keeps more the more it sees freed."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024) == 1


def rises(place: Path) -> dict[str, int]:
    """By what was done: bytes by which resident memory rose at most, beyond the parameters that were loaded."""
    give_freed_memory_back()
    shape = read_shape(place / "hf")
    found = {}
    for name, (source, writer) in WRITERS.items():
        before = forget_peak()
        convert_folder(place / source, place / name, writer(shape), workers=2)
        found[name] = resident()[1] - before
    world = start(Parallel(), Precision(dtype="fp32"), seed=0, deadline_s=120)
    chunks = build(shape, transformer_config(shape, Parallel(), Precision(dtype="fp32")), Precision(dtype="fp32"))
    held = sum(parameter.nbytes for parameter in chunks[0].parameters())
    before = forget_peak()
    Weights(shape, chunks, world).read(place / "hf")  # the parameters' memory becomes resident as they are filled
    found["loading"] = resident()[1] - before - held
    return found


@pytest.mark.parallel
@pytest.mark.slow
def test_memory_stays_below_a_few_layers(tmp_path: Path) -> None:
    """16 layers are converted each way by two threads, and loaded for training as by a rank that holds them all.
    The peak is the kernel's own count. Not counted: the tens of megabytes of freed memory that glibc may keep for
    later, whatever the model's size."""
    write_model(tmp_path / "hf", "llama", torch.float32, files=2, **SIZES)
    bound = LAYERS * layer_bytes(read_shape(tmp_path / "hf"))
    [found] = spawn(rises, 1, (tmp_path,), timeout=240)
    assert found.keys() == {*WRITERS, "loading"}
    assert all(rise <= bound for rise in found.values()), (bound, found)
