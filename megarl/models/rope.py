"""Rotary position embedding: the kinds that can be trained, and what learner and embedded engine compute from one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarl.models.shape import ModelShape

KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Each kind, by transformers' `rope_type`, and the parameters that it needs. A kind whose frequencies depend on a
sequence's length ("dynamic", "longrope") cannot be trained: a cached key would change as its sequence grows."""


class Rotary(NamedTuple):
    """What attention computes with."""

    frequencies: Tensor  # float32 [head_dim / 2], radians per token
    softmax_scale: float  # of the scores


def rotary(shape: ModelShape) -> Rotary:
    """Frequencies and score scale of a shape, as transformers computes them.

    YaRN (arXiv 2309.00071) multiplies rotated queries and keys by an attention factor. The whole head is rotated, so
    this is the factor's square in the scale of the scores, which every attention kernel accepts.
    """
    d, rope = shape.head_dim, shape.rope
    if rope.kind == "default":
        return Rotary(1.0 / rope.theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d), d**-0.5)
    from transformers import PreTrainedConfig  # slow to import, and rarely needed
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "head_dim": d,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": rope.kind, "rope_theta": rope.theta, **dict(rope.parameters)},
    }
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](PreTrainedConfig(**config), torch.device("cpu"))
    return Rotary(frequencies, d**-0.5 * factor**2)
