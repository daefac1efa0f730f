"""Tokens/s, MFU and peak memory of whole updates of 1.4 billion parameters, with the planner's predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megarl.bench.common.learners import TIMEOUT, new_learner, settings
from megarl.bench.common.models import write_config
from megarl.bench.gpu.batches import full_rows
from megarl.bench.gpu.fp8 import check_recipe
from megarl.bench.gpu.part import Scale
from megarl.bench.gpu.timing import milliseconds
from megarl.config import Settings
from megarl.learner.learner import sft_objective
from megarl.models.config_json import read_shape
from megarl.planner.hardware import GIB, GPUS, Gpu
from megarl.planner.job import software
from megarl.planner.layout import Layout
from megarl.planner.memory import plan_memory
from megarl.planner.steptime import step_time
from megarl.runtime import device
from megarl.runtime.spawn import spawn

EACH = 1024  # input tokens of a sequence


def speed(
    scale: Scale,
    folder: Path,
    precision: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    each: int = EACH,
    ranks: int = 1,
) -> dict[str, Any]:
    """Median of `scale.repeats` updates on `ranks` devices, after two that are not timed.

    `planned_*`: the planner's, where it knows this GPU. MFU is of the bf16 peak.
    """
    check_recipe(precision)
    write_config(folder, **scale.medium)
    precision = precision or {"dtype": "bf16"}
    arguments = (scale, folder, precision, parallel or {}, min(each, scale.tokens))
    found = _updates(*arguments) if ranks == 1 else spawn(_updates, ranks, arguments, TIMEOUT)[0]
    return found | _planned(scale, folder, found, _settings(folder, precision, parallel or {}), each, ranks)


def card(name: str, memory: float) -> Gpu | None:
    """The planner's GPU whose name is part of a device's `name`, with the nearest `memory` (GiB). None: not known."""
    named = [gpu for gpu in GPUS.values() if gpu.name.partition("-")[0] in name.lower()]
    return min(named, key=lambda gpu: abs(gpu.memory - memory)) if named else None


def _settings(folder: Path, precision: dict[str, Any], parallel: dict[str, Any]) -> Settings:
    return settings(folder, parallel, precision=precision, model={"path": folder, "weights": "random"})


def _updates(
    scale: Scale, folder: Path, precision: dict[str, Any], parallel: dict[str, Any], each: int
) -> dict[str, Any]:
    """Runs on every rank."""
    learner = new_learner(_settings(folder, precision, parallel), total_updates=100)
    batch = full_rows(scale.rows, scale.tokens, each, learner.shape.vocab) if learner.world.is_controller else None
    taken = milliseconds(lambda: learner.train_step(batch, sft_objective), scale.repeats, warm=2)
    peak = device.peak_memory()
    scoring = milliseconds(lambda: learner.logprobs(batch, "policy"), 1)
    streaming = milliseconds(lambda: [None for _ in learner.named_tensors()], 1)
    return {
        "tokens_per_s": scale.rows * scale.tokens / taken * 1e3,
        "update_ms": taken,
        "peak_gib": peak / GIB,
        "logprobs_ms": scoring,
        "weights_stream_ms": streaming,
    }


def _planned(
    scale: Scale, folder: Path, found: dict[str, Any], chosen: Settings, each: int, ranks: int
) -> dict[str, Any]:
    gpu = GPUS["h100"]  # in the rehearsal
    if device.on_cuda():
        properties = torch.cuda.get_device_properties(0)
        known = card(properties.name, properties.total_memory / GIB)
        if known is None:
            return {}
        gpu = known
    shape = read_shape(folder)
    sizes = {"tp": chosen.parallel.tp, "cp": chosen.parallel.cp}
    layout = Layout(
        gpus=ranks, global_batch=scale.rows, sequence=scale.tokens, attended=min(each, scale.tokens), **sizes
    )
    stack = replace(software(chosen), dp_overlap=False)
    planned = step_time(shape, layout, stack, gpu)
    return {
        "mfu": planned.flops / ranks / (found["update_ms"] / 1e3) / gpu.peak("bf16"),
        "planned_ms": 1e3 * planned.seconds,
        "planned_gib": plan_memory(shape, layout, stack)[0].allocated,
        "planned_for": gpu.name,
    }
