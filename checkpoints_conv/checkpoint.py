"""A checkpoint in any format is a source of Hugging Face tensors, read rule by rule."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.models.files.regular import contents, short
from megarl.models.files.tensor_io import Joined, Values
from megarl.models.layout import Layout
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's file that names the newest iteration
RELEASE = "release"  # the folder's name, and the tracker's word, without a training iteration
LEARNER = "learner"  # the folder of tensors in a run's checkpoint, RUN/checkpoints/step_NNNNNN


class Checkpoint(Protocol):
    """What conversion, verification and the tools read. Safe to use from several threads."""

    format: str  # "Hugging Face", "Megatron torch_dist", "Megatron classic"
    folder: Path  # has config.json, tokenizer and so on

    @property
    def model(self) -> ModelShape: ...

    def check_whole(self) -> None:
        """Raise UserError unless exactly the model's tensors are there, complete and in shape. Reads no weights."""
        ...

    def dtype(self, rule: Rule) -> torch.dtype:
        """The type that the parts of `rule` are stored in; UserError if they differ."""
        ...

    def parts(self, rule: Rule) -> Mapping[str, Values]:
        """The Hugging Face tensors of `rule`, unsharded and unpadded; those in files as descriptions.

        Accepts rules of either layer spec.
        """
        ...

    def files(self) -> list[Path]:
        """The files with the weights."""
        ...


def parts_of(rule: Rule, shards: Sequence[Tensor]) -> dict[str, Values]:
    """The Hugging Face tensors in the shards of a Megatron tensor."""
    if rule.partition == 1 and len(shards) > 1:
        return {rule.hf[0]: Joined(shards, 1)}
    found: dict[str, list[Tensor]] = {name: [] for name in rule.hf}
    for rank, shard in enumerate(shards):
        for name, blocks in rule.rows_of(shard, rank, len(shards)).items():
            found[name].extend(blocks)
    return {name: blocks[0] if len(blocks) == 1 else Joined(blocks) for name, blocks in found.items()}


def megatron_folders(path: Path) -> list[Path]:
    """Where the tensors of `path` may be: there, in a run's folder for them, or in the tracker file's iteration."""
    found = [path, path / LEARNER]
    tracker = path / TRACKER
    if tracker.exists():
        word = short(contents(tracker, 1000).decode(errors="replace"), 40)
        if word != RELEASE and not re.fullmatch("[0-9]{1,12}", word):
            raise UserError(f"{tracker}: names {word!r}, which is no iteration; write a number, or {RELEASE!r}")
        found.append(path / (RELEASE if word == RELEASE else f"iter_{int(word):07d}"))
    return found


def megatron_arguments(model: ModelShape, layout: Layout, vocab_rows: int) -> Namespace:
    """The model's arguments, by the names of Megatron-LM's command line; Megatron-LM saves them with the tensors."""
    arguments: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "group_query_attention": True,
        "num_query_groups": model.kv_groups,
        "kv_channels": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "position_embedding_type": "rope",
        "rotary_base": model.rope.theta,
        "normalization": "RMSNorm",
        "norm_epsilon": model.norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tied,
        "padded_vocab_size": vocab_rows,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
    }
    if model.moe is not None:
        arguments |= {
            "num_experts": model.moe.count,
            "moe_router_topk": model.moe.top_k,
            "moe_ffn_hidden_size": model.moe.ffn,
        }
    return Namespace(**arguments)
