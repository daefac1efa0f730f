"""GB/s of the checksum that a weight update takes of every tensor, on the CPU and on this device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megarl.bench.gpu.part import Scale
from megarl.bench.gpu.timing import milliseconds, where
from megarl.rollout.in_engine.megarl_weights import checksum


def checksums(scale: Scale, folder: Path) -> dict[str, Any]:
    """Of one bf16 tensor of `scale.megabytes`."""
    found = {}
    for place in dict.fromkeys(("cpu", where().type)):
        tensor = torch.randn(scale.megabytes << 19, device=place).bfloat16()
        found[f"{place}_gb_per_s"] = tensor.nbytes / milliseconds(lambda: checksum(tensor), 2) / 1e6  # noqa: B023
    return found
