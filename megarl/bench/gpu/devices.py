"""Collectives between the devices of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.bench.common.learners import TIMEOUT, settings
from megarl.bench.gpu.part import Scale
from megarl.bench.gpu.timing import milliseconds
from megarl.learner.parallel import start
from megarl.runtime import device
from megarl.runtime.spawn import spawn


def bandwidth(scale: Scale, folder: Path) -> dict[str, Any]:
    """Bus bandwidth in GB/s as nccl-tests define it, of `scale.megabytes` on each of all devices."""
    ranks = torch.cuda.device_count() if device.on_cuda() else 2
    return {"ranks": ranks, **spawn(_bandwidth, ranks, (scale, folder), TIMEOUT)[0]}


def _bandwidth(scale: Scale, folder: Path) -> dict[str, float]:
    """Runs on every rank."""
    chosen = settings(folder)
    world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
    whole = torch.ones(scale.megabytes << 18, device=world.device)
    whole = whole[: len(whole) // world.world_size * world.world_size]
    part = whole[: len(whole) // world.world_size].clone()
    moved = whole.nbytes * (world.world_size - 1) / world.world_size / 1e6  # MB that a rank sends, and ms: GB/s
    return {
        "all_reduce_gb_per_s": 2 * moved / milliseconds(lambda: dist.all_reduce(whole), 5, warm=2),
        "all_gather_gb_per_s": moved / milliseconds(lambda: dist.all_gather_into_tensor(whole, part), 5, warm=2),
        "reduce_scatter_gb_per_s": moved / milliseconds(lambda: dist.reduce_scatter_tensor(part, whole), 5, warm=2),
    }
