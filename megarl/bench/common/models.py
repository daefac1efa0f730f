"""Tiny models in Hugging Face's layout, for benchmarks and tests that need weights but no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import torch
import transformers

Family = Literal["qwen3", "qwen3_moe", "qwen2", "llama"]


class Sizes(TypedDict, total=False):
    """Entries of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None


SIZES: Sizes = {
    "vocab_size": 510,  # needs padding
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.08,  # larger than usual, so that gradients are not all tiny
}
EXPERTS: Sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_model(
    folder: Path, family: Family = "qwen3", tied: bool = False, seed: int = 0, **sizes: Unpack[Sizes]
) -> Any:
    """Write a random model of `family` to `folder` and return transformers' float32 model of it.

    Norms and biases are random too, so that a missing one shows. `sizes` override the entries of config.json.
    """
    torch.manual_seed(seed)
    model = _model(family, {**SIZES, "tie_word_embeddings": tied, **sizes}).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model


def write_config(folder: Path, family: Family = "qwen3", tied: bool = False, **sizes: Unpack[Sizes]) -> Any:
    """Write only the config.json of such a model, and return transformers' model of it on the meta device."""
    with torch.device("meta"):
        model = _model(family, {**SIZES, "tie_word_embeddings": tied, **sizes})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return model


def _model(family: Family, sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    if family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{"head_dim": 16, "rope_theta": 1e6, **sizes}))
    if family == "qwen3_moe":
        return transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**{"head_dim": 16, "rope_theta": 1e6, **EXPERTS, **sizes})
        )
    if family == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{"rope_theta": 1e6, **sizes}))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{"rope_parameters": LLAMA3, **sizes}))
