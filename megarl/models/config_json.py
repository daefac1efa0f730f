"""A model's config.json as a `ModelShape`: the one place that reads it, and refuses what cannot be trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.models.families import FAMILIES
from megarl.models.rope import KINDS
from megarl.models.shape import Experts, ModelShape, Rope

Get = Callable[..., Any]


def read_shape(config: Mapping[str, Any] | Path) -> ModelShape:
    """The shape that a config.json describes. `config`: its contents, the file, or the model folder.

    Raises UserError for an unknown architecture (naming the known ones), a missing key, or an unsupported value.
    """
    if isinstance(config, Path):
        config = read_config(config)
    architecture = (config.get("architectures") or ["(none)"])[0]
    family = next((f for f in FAMILIES.values() if f.architecture == architecture), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise UserError(f"config.json: architecture {architecture} is unknown (known: {known})")

    def get(key: str, *default: Any) -> Any:
        """The value of `key`; where it is missing or null, the family's default, then `default`."""
        for values in (config, family.defaults):
            if values.get(key) is not None:
                return values[key]
        if not default:
            raise UserError(f"config.json: {key} is missing")
        return default[0]

    if get("quantization_config", None):
        raise UserError("config.json: quantization_config: quantised weights cannot be trained; use the bf16 release")
    for key, value in family.required.items():
        _only(value, get(key, value), key, architecture)
    for kind in get("layer_types", ()):
        _only("full_attention", kind, "layer_types", architecture)
    hidden, heads, positions = get("hidden_size"), get("num_attention_heads"), get("max_position_embeddings")
    return ModelShape(
        family=family.name,
        layers=get("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_groups=get("num_key_value_heads", heads),
        head_dim=get("head_dim", hidden // heads),
        ffn=get("intermediate_size"),
        vocab=get("vocab_size"),
        tied=get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope=_rope(get, architecture, positions),
        norm_eps=get("rms_norm_eps"),
        max_positions=positions,
        moe=_experts(get) if family.expert else None,
        initial_std=get("initializer_range", 0.02),
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


def _only(value: Any, found: Any, key: str, architecture: str) -> None:
    if found != value:
        raise UserError(f"config.json: {key}: {found!r} is not supported for {architecture}; only {value!r}")


def _experts(get: Get) -> Experts:
    """transformers 5 writes the number of experts under another name than the published configs."""
    count = get("num_local_experts", None) or get("num_experts")
    return Experts(count, get("num_experts_per_tok"), get("moe_intermediate_size"), get("norm_topk_prob"))


def _rope(get: Get, architecture: str, positions: int) -> Rope:
    """transformers 5 writes one `rope_parameters`; older releases write `rope_theta` and `rope_scaling`."""
    older, newer = get("rope_scaling", {}), get("rope_parameters", {})
    if older and newer and older != newer:  # transformers and the engines do not agree which one counts
        raise UserError("config.json: rope_scaling and rope_parameters differ; keep only one of them")
    values = {key: value for key, value in (older or newer).items() if value is not None}
    name = "rope_scaling" if older else "rope_parameters"
    kinds = [values.pop("rope_type", None), values.pop("type", None)]
    kind = kinds[0] or kinds[1] or "default"
    if kind not in KINDS or any(isinstance(value, dict) for value in values.values()):
        found = repr(kind) if kind not in KINDS else "one for each layer type"
        raise UserError(f"config.json: {name}: {found} is not supported; only {', '.join(KINDS)}")
    theta = values.pop("rope_theta", get("rope_theta", 10000.0))
    partial = values.pop("partial_rotary_factor", get("partial_rotary_factor", 1.0))
    _only(1.0, partial, "partial_rotary_factor", architecture)
    if "original_max_position_embeddings" in KINDS[kind]:
        trained = values.get("original_max_position_embeddings", positions)
        values["original_max_position_embeddings"] = get("original_max_position_embeddings", trained)
    for key in KINDS[kind]:
        if key not in values:
            raise UserError(f"config.json: {name}: {kind!r} needs {key}")
    return Rope(float(theta), kind, tuple(sorted(values.items())) if kind != "default" else ())
