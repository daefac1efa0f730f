"""The learner's arithmetic: its types, where FP8 applies, and the manifest that records both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megarl.config import Precision
from megarl.errors import UserError
from megarl.learner.quantise import E4M3, HISTORY, block_shape, formats
from megarl.models.shape import ModelShape
from megarl.run.atomic import write_text
from megarl.runtime import device

MANIFEST = "quantisation.json"  # in the run directory


def check(precision: Precision) -> None:
    """Raise UserError for FP8 on a GPU without Transformer Engine: Megatron would accept the setting and ignore it."""
    if precision.dtype == "fp8" and device.on_cuda() and not device.transformer_engine():
        raise UserError("precision.dtype: fp8 on a GPU needs Transformer Engine; nearest valid value: bf16")


def emulated(precision: Precision) -> bool:
    """Whether FP8 is computed in software here (learner/emulation.py)."""
    return precision.dtype == "fp8" and not device.on_cuda()


def fp8_layers(precision: Precision, layers: int) -> range:
    """The transformer layers in FP8, numbered from 0. The other layers, the embedding and the output layer are bf16."""
    kept = precision.high_precision_layers
    return range(kept, max(kept, layers - kept))


def manifest(precision: Precision, shape: ModelShape) -> dict[str, Any]:
    """What is quantised and how."""
    found: dict[str, Any] = {"dtype": precision.dtype}
    if precision.dtype != "fp8":
        return found
    layers, roles = fp8_layers(precision, shape.layers), formats(precision.recipe)
    found |= {
        "recipe": precision.recipe,
        "formats": {role: fmt.name for role, fmt in roles.items()},
        "first_layer": layers.start,
        "last_layer": layers.stop - 1,
        "high_precision": ["embedding", "norms", "router", "output_layer"],
        "emulated": emulated(precision),
    }
    if precision.recipe == "delayed":
        found["history"] = HISTORY
    if precision.recipe in ("blockwise", "mxfp8"):
        found["blocks"] = {role: list(block_shape(precision.recipe, role, 1)) for role in roles}
    return found


def write_manifest(folder: Path, precision: Precision, shape: ModelShape) -> Path:
    """Write the manifest into the run directory."""
    file = folder / MANIFEST
    write_text(file, json.dumps(manifest(precision, shape), indent=1) + "\n")
    return file


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Type of parameters and activations. Main parameters, gradients and optimizer state are float32."""
    return torch.float32 if precision.dtype == "fp32" else torch.bfloat16


def transformer_settings(precision: Precision) -> dict[str, Any]:
    """The entries of Megatron's TransformerConfig that depend on the precision."""
    dtype = parameter_dtype(precision)
    settings: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype == torch.bfloat16}
    if precision.dtype == "fp8" and not emulated(precision):
        gradients = formats(precision.recipe)["gradient"]
        settings |= {"fp8": "e4m3" if gradients is E4M3 else "hybrid", "fp8_recipe": precision.recipe}
        if precision.recipe == "delayed":
            settings |= {"fp8_amax_history_len": HISTORY, "fp8_amax_compute_algo": "max"}
        if precision.high_precision_layers:
            kept = precision.high_precision_layers
            settings |= {
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": kept,
                "num_layers_at_end_in_bf16": kept,
            }
    return settings


def row_multiple(precision: Precision) -> int:
    """Tokens per rank must be a multiple of this: 16 for FP8 matrix products, 32 for MXFP8."""
    if precision.dtype != "fp8":
        return 1
    return 32 if precision.recipe == "mxfp8" else 16
