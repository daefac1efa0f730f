"""What is installed, and the device."""

from __future__ import annotations

import platform
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from megarl.bench.gpu.part import Scale
from megarl.planner.hardware import GIB
from megarl.runtime import device

PACKAGES = ("megatron-core", "transformers", "transformer-engine", "transformer-engine-torch", "flash-attn", "apex")


def versions(scale: Scale, folder: Path) -> dict[str, Any]:
    """Of Python, torch, its libraries and the packages; names, memory and capability of the devices."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    found |= {name: version for name in PACKAGES if (version := _version(name))}
    if device.on_cuda():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "devices": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / GIB,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def transformer_engine(scale: Scale, folder: Path) -> dict[str, Any]:
    """Imports it, which fails when it was built for another torch."""
    import_module("transformer_engine.pytorch")
    return {"version": metadata.version("transformer-engine"), "used": device.transformer_engine()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
