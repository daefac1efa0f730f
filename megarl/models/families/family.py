"""What a family's file declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarl.models.rules import Maker, norm, vocabulary


@dataclass(frozen=True)
class Family:
    """A model family: how to recognise it, what its config.json must say, and its tables of rules.

    Names in `model` are complete. Names in `layer` follow `decoder.layers.N.` and `model.layers.N.`, and names in
    `expert` follow the expert's prefix. Megatron names are those of the local layer spec.
    """

    name: str
    architecture: str  # as in config.json
    model: tuple[Maker, ...]
    layer: tuple[Maker, ...]
    expert: tuple[Maker, ...] = ()
    qk_norm: bool = False
    qkv_bias: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)  # the value of a missing key
    required: Mapping[str, Any] = field(default_factory=dict)  # keys that are missing or have this value


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

MODEL = (
    vocabulary("embedding.word_embeddings.weight", EMBEDDING),
    norm("decoder.final_layernorm.weight", "model.norm.weight"),
    vocabulary("output_layer.weight", OUTPUT),
)
"""Embedding, final norm and output layer of every family so far. For tied embeddings see `families.rules`."""
