"""The learner's arithmetic: its types, where FP8 applies, and the manifest that records both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megarl.config import Precision
from megarl.errors import UserError
from megarl.learner.quantise import E4M3, HISTORY, TILE, Recipe, block_shape, formats
from megarl.models.shape import ModelShape
from megarl.run.atomic import write_text
from megarl.runtime import device

MANIFEST = "quantisation.json"  # in the run directory


def check(precision: Precision) -> None:
    """Raise UserError for FP8 that this device cannot do. Needs no model.

    Without Transformer Engine Megatron would accept the setting and ignore it. A recipe that this GPU does not support
    would fail after the model is built.
    """
    if precision.dtype != "fp8":
        return
    if precision.recipe == "delayed" and precision.high_precision_layers:
        raise UserError(
            f"precision.high_precision_layers: {precision.high_precision_layers}: recipe delayed cannot leave layers "
            "in bf16; nearest valid value: 0, or recipe: auto"
        )
    if emulated(precision):
        return
    if not device.transformer_engine():
        raise UserError("precision.dtype: fp8 on a GPU needs Transformer Engine; nearest valid value: bf16")
    if reason := unsupported(recipe(precision)):
        raise UserError(f"precision.recipe: {precision.recipe}: {reason}; set recipe: auto, or precision.dtype: bf16")


def check_layers(precision: Precision, layers: int, pp: int) -> None:
    """Raise UserError if a pipeline stage has fewer than `high_precision_layers` of the model's layers."""
    kept, most = precision.high_precision_layers, layers // pp
    if precision.dtype == "fp8" and kept > most:
        raise UserError(
            f"precision.high_precision_layers: {kept} is more than the {most} layers of a pipeline stage; "
            f"nearest valid value: {most}"
        )


def unsupported(recipe: Recipe) -> str:
    """Why Transformer Engine cannot do `recipe` on this device; empty if it can. Asks Transformer Engine."""
    import transformer_engine.pytorch as te

    asked = {"blockwise": te.is_fp8_block_scaling_available, "mxfp8": te.is_mxfp8_available}
    available, reason = asked.get(recipe, te.is_fp8_available)(return_reason=True)
    return "" if available else str(reason).rstrip(".")


def recipe(precision: Precision) -> Recipe:
    """The FP8 recipe, with `auto` decided by this device: its newest one that Transformer Engine supports."""
    if precision.recipe != "auto":
        return precision.recipe
    if emulated(precision) or not device.transformer_engine():
        return "tensorwise"
    finest: tuple[Recipe, ...] = ("mxfp8", "blockwise")
    return next((each for each in finest if not unsupported(each)), "tensorwise")


def describe(precision: Precision) -> str:
    """The learner's types, in words."""
    if precision.dtype != "fp8":
        return precision.dtype
    text = f"fp8, recipe {recipe(precision)}"
    if precision.recipe == "auto":
        text += ", chosen for this device (blockwise on Hopper, mxfp8 on Blackwell)"
    if precision.high_precision_layers:
        text += f", {precision.high_precision_layers} first and last layers in bf16"
    return text + (", emulated on this CPU" if emulated(precision) else "")


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
    layers, chosen = fp8_layers(precision, shape.layers), recipe(precision)
    roles = formats(chosen)
    found |= {
        "recipe": chosen,
        "formats": {role: fmt.name for role, fmt in roles.items()},
        "first_layer": layers.start,
        "last_layer": layers.stop - 1,
        "high_precision": ["embedding", "norms", "router", "output_layer"],
        "emulated": emulated(precision),
    }
    if chosen == "delayed":
        found["history"] = HISTORY
    if chosen in ("blockwise", "mxfp8"):
        found["blocks"] = {role: list(block_shape(chosen, role, 1)) for role in roles}
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
        chosen = recipe(precision)
        gradients = formats(chosen)["gradient"]
        settings |= {"fp8": "e4m3" if gradients is E4M3 else "hybrid", "fp8_recipe": chosen}
        if chosen == "delayed":
            settings |= {"fp8_amax_history_len": HISTORY, "fp8_amax_compute_algo": "max"}
        if precision.high_precision_layers:
            kept = precision.high_precision_layers
            settings |= {
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": kept,
                "num_layers_at_end_in_bf16": kept,
            }
    return settings


def row_multiple(precision: Precision, split: bool) -> int:
    """Tokens per rank must be a multiple of this: 16 for FP8 matrix products, 32 for MXFP8.

    `split`: ranks have parts of the tokens (sequence parallelism). Transformer Engine gathers them quantised, so that
    each part must be whole blocks: 128 tokens with blockwise scaling.
    """
    if precision.dtype != "fp8":
        return 1
    chosen = recipe(precision)
    if chosen == "blockwise" and split:
        return TILE
    return 32 if chosen == "mxfp8" else 16
