"""What a model's config.json says, as a `ModelShape`: read in this one place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.models.families import FAMILIES
from megarl.models.shape import Experts, ModelShape


def read_shape(config: Mapping[str, Any] | Path) -> ModelShape:
    """The shape described by a config.json: its contents, the file, or the model folder that holds it.

    Raises UserError for an unknown architecture (naming the known), a missing key, or a setting the map does not cover.
    """
    if isinstance(config, Path):
        config = read_config(config)
    architecture = (config.get("architectures") or ["(none)"])[0]
    family = next((f for f in FAMILIES.values() if f.architecture == architecture), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise UserError(f"config.json: architecture {architecture} is unknown (known: {known})")
    if config.get("quantization_config"):
        raise UserError("config.json: quantization_config: quantised weights cannot be trained; use the bf16 release")
    for key, value in family.required.items():
        if (config.get(key) or value) != value:
            raise UserError(f"config.json: {key}: {config[key]!r} is not supported for {architecture}; only {value!r}")
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}

    def get(key: str) -> Any:
        if key not in values:
            raise UserError(f"config.json: {key} is missing")
        return values[key]

    theta, scaling = _rope(values)
    return ModelShape(
        family=family.name,
        layers=get("num_hidden_layers"),
        hidden=get("hidden_size"),
        heads=get("num_attention_heads"),
        kv_groups=values.get("num_key_value_heads", get("num_attention_heads")),
        head_dim=values.get("head_dim", get("hidden_size") // get("num_attention_heads")),
        ffn=get("intermediate_size"),
        vocab=get("vocab_size"),
        tied=values.get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=get("rms_norm_eps"),
        max_positions=get("max_position_embeddings"),
        moe=_experts(get, values) if family.expert else None,
        initial_std=values.get("initializer_range", 0.02),
    )


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a config.json, given the file or its folder."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path}: has no config.json" if path.is_dir() else f"{path}: does not exist")
    try:
        return json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file}: is not JSON: {e}") from None


def _experts(get: Callable[[str], Any], values: Mapping[str, Any]) -> Experts:
    """transformers 5 writes the number of experts under another name than the published configs."""
    count = values["num_local_experts"] if "num_local_experts" in values else get("num_experts")
    return Experts(count, get("num_experts_per_tok"), get("moe_intermediate_size"), get("norm_topk_prob"))


def _rope(values: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling): transformers 5 keeps both in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    scaling = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or values.get("rope_theta", 10000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    return float(theta), None if kind == "default" else {"rope_type": kind, **scaling}
