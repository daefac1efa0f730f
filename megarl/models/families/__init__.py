"""The known families, and the rules of a model. To add a family: one file like qwen3.py, one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from megarl.models.families import llama, qwen2, qwen3, qwen3_moe
from megarl.models.families.family import EMBEDDING, OUTPUT, Family
from megarl.models.rules import Part, Rule, Spec, prefixed
from megarl.models.shape import ModelShape

FAMILIES: dict[str, Family] = {f.FAMILY.name: f.FAMILY for f in (qwen3, qwen3_moe, qwen2, llama)}


def rules(shape: ModelShape, spec: Spec = "local", vocab_rows: int | None = None) -> list[Rule]:
    """Every Megatron tensor of the model, in layer order. Each Hugging Face tensor is in exactly one rule.

    `spec` chooses the names: those of Megatron's own modules, or Transformer Engine's.
    `vocab_rows`: vocabulary after padding (`layout.padded_vocab`); default: no padding.
    Tied embeddings add a rule with `copy=True`: the `output_layer.weight` of a last stage that is not the first.
    """
    return list(_rules(shape, spec, vocab_rows or shape.vocab))


def _rules(shape: ModelShape, spec: Spec, vocab_rows: int) -> Iterator[Rule]:
    family = FAMILIES[shape.family]
    embedding, *rest = (_padded(make(shape), vocab_rows) for make in family.model)
    yield embedding
    per_layer = [_renamed(make(shape), lambda name: _layer_name(name, shape, spec)) for make in family.layer]
    per_expert = [make(shape) for make in family.expert]
    for layer in range(shape.layers):
        megatron, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for rule in per_layer:
            yield prefixed(rule, megatron, hf, layer)
        for expert in range(shape.moe.count if shape.moe else 0):
            for rule in per_expert:
                named = replace(rule, megatron=_expert_name(rule.megatron, expert, spec))
                yield prefixed(named, megatron + "mlp.experts.", f"{hf}mlp.experts.{expert}.", layer, expert)
    for rule in rest:
        if shape.tied and rule.hf == (OUTPUT,):
            yield replace(rule, parts=(Part(EMBEDDING, rule.parts[0].shape),), copy=True)
        else:
            yield rule


def _padded(rule: Rule, vocab_rows: int) -> Rule:
    return rule if rule.rows is None else replace(rule, rows=vocab_rows)


def _renamed(rule: Rule, rename: Callable[[str], str]) -> Rule:
    return replace(rule, megatron=rename(rule.megatron))


def _layer_name(name: str, shape: ModelShape, spec: Spec) -> str:
    """Transformer Engine fuses a norm into the linear layer after it. A router is no such layer."""
    if spec == "te":
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        if shape.moe is None:
            name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return name


def _expert_name(name: str, expert: int, spec: Spec) -> str:
    """Megatron's own experts are modules in a list. Transformer Engine's grouped linear layer numbers its weights."""
    return f"{name}{expert}" if spec == "te" else f"local_experts.{expert}.{name}"
