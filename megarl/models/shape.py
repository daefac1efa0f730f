"""The sizes of a model, as learner, embedded engine, planner, packing and conversion read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts, the same in every layer."""

    count: int
    top_k: int
    ffn: int  # width of one expert
    normalise: bool  # whether the chosen experts' probabilities are scaled to sum to 1


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only transformer and the switches that change its tensors or its arithmetic."""

    family: str  # key of `families.FAMILIES`
    layers: int
    hidden: int
    heads: int  # query heads
    kv_groups: int  # key/value heads
    head_dim: int
    ffn: int  # width of the dense MLP
    vocab: int  # unpadded
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_norm: bool
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # e.g. Llama 3's, with its "rope_type"
    norm_eps: float
    max_positions: int
    moe: Experts | None = None
    initial_std: float = 0.02  # of random weights (`initializer_range`; transformers' default)
