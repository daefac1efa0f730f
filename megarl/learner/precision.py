"""The learner's arithmetic: which types, and whether they are to be had here. The one seam for FP8."""

from __future__ import annotations

from typing import Any

import torch

from megarl.config import Precision
from megarl.errors import UserError
from megarl.learner import device

RECIPES = {"delayed": "delayed", "tensorwise": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}
"""Setting → Megatron's `fp8_recipe`."""


def check(precision: Precision) -> None:
    """Raise UserError for FP8 without Transformer Engine: Megatron would accept the setting and ignore it."""
    if precision.dtype == "fp8" and not device.transformer_engine():
        raise UserError("precision.dtype: fp8 needs a CUDA device and Transformer Engine; nearest valid value: bf16")


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Of the model's parameters and activations. Main parameters, gradients and optimizer state are float32."""
    return torch.float32 if precision.dtype == "fp32" else torch.bfloat16


def transformer_settings(precision: Precision) -> dict[str, Any]:
    """The part of Megatron's TransformerConfig that the precision decides."""
    dtype = parameter_dtype(precision)
    settings: dict[str, Any] = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype == torch.bfloat16}
    if precision.dtype == "fp8":
        settings |= {"fp8": "hybrid", "fp8_recipe": RECIPES[precision.recipe]}
    return settings


def row_multiple(precision: Precision) -> int:
    """Tokens per rank must be a multiple of this: FP8 matrix products need 16, with MXFP8 32."""
    if precision.dtype != "fp8":
        return 1
    return 32 if precision.recipe == "mxfp8" else 16
