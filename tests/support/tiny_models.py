"""Small random models, one config a family; and weights for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.shape import ModelShape

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def config(family: str, **sizes: Any) -> dict[str, Any]:
    """A tiny config.json of the family; 4 layers, 8 heads, 4 key/value heads unless told otherwise."""
    tiny: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 101,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if family != "qwen2":  # its models have no head_dim of their own
        tiny["head_dim"] = 8
    if family == "qwen3_moe":
        tiny |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return tiny | sizes


def tiny(family: str, **sizes: Any) -> ModelShape:
    return read_shape(config(family, **sizes))


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The shape of a transformers configuration."""
    return read_shape({**config.to_dict(), "architectures": [ARCHITECTURES[config.model_type]]})


def weights(shape: ModelShape, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Random Hugging Face weights of the shape."""
    random = torch.Generator().manual_seed(seed)
    parts = [part for rule in rules(shape) if not rule.copy for part in rule.parts]
    return {part.name: torch.randn(part.shape, generator=random).to(dtype) for part in parts}
