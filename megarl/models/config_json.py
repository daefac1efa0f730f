"""A model's config.json as a `ModelShape`: the one place that reads it, and refuses what cannot be trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megarl.errors import UserError
from megarl.models.families import FAMILIES
from megarl.models.files.regular import read_json, short
from megarl.models.rope import KINDS
from megarl.models.shape import Experts, ModelShape, Rope

Get = Callable[..., Any]
LARGEST = {
    "num_hidden_layers": 10_000, "hidden_size": 2**20, "num_attention_heads": 2**16, "num_key_value_heads": 2**16,
    "head_dim": 2**16, "intermediate_size": 2**24, "vocab_size": 2**28, "max_position_embeddings": 2**31,
    "num_experts": 2**16, "num_local_experts": 2**16, "num_experts_per_tok": 2**16, "moe_intermediate_size": 2**24,
}  # fmt: skip
"""Far above any model. A larger number is damage, and would take memory before anybody could tell."""
MOST_EXPERTS = 2**18  # of all layers together
CONFIG_LIMIT = 10_000_000  # bytes


def read_shape(config: Mapping[str, Any] | Path) -> ModelShape:
    """The shape that a config.json describes. `config`: its contents, the file, or the model folder.

    Raises UserError for an unknown architecture (naming the known ones), a missing key, or an unsupported value.
    """
    if isinstance(config, Path):
        config = read_config(config)
    try:
        return _shape(config)
    except UserError:
        raise
    except Exception as e:  # of many kinds, because any value may be of any type
        raise UserError(f"config.json: does not describe a model: {short(e) or type(e).__name__}") from None


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a config.json, given the file or its folder."""
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{path}: has no config.json" if path.is_dir() else f"{path}: does not exist")
    found = read_json(file, CONFIG_LIMIT)
    if not isinstance(found, dict):
        raise UserError(f"{file}: is a {type(found).__name__}, not a mapping of settings")
    return found


def _shape(config: Mapping[str, Any]) -> ModelShape:
    architecture = (config.get("architectures") or ["(none)"])[0]
    family = next((f for f in FAMILIES.values() if f.architecture == architecture), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise UserError(
            f"config.json: architecture {short(architecture, 80)} is unknown (known: {known}); "
            "docs/add_model_family.md shows how one is added"
        )

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
    _check_dtype(get)
    layers, hidden, heads = (_whole(get, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    groups, positions = _whole(get, "num_key_value_heads", heads), _whole(get, "max_position_embeddings")
    if heads % groups:
        raise UserError(f"config.json: num_key_value_heads: {groups} does not divide num_attention_heads, {heads}")
    moe = _experts(get) if family.expert else None
    if moe and layers * moe.count > MOST_EXPERTS:
        raise UserError(f"config.json: {layers} layers of {moe.count} experts are more than {MOST_EXPERTS:,}")
    return ModelShape(
        family=family.name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_groups=groups,
        head_dim=_whole(get, "head_dim", hidden // heads),
        ffn=_whole(get, "intermediate_size"),
        vocab=_whole(get, "vocab_size"),
        tied=_flag(get, "tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope=_rope(get, architecture, positions),
        norm_eps=_real("rms_norm_eps", get("rms_norm_eps")),
        max_positions=positions,
        moe=moe,
        initial_std=_real("initializer_range", get("initializer_range", 0.02)),
    )


def _whole(get: Get, key: str, *default: int) -> int:
    value, most = get(key, *default), LARGEST[key]
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"config.json: {key}: {_shown(value)} is not a whole number from 1 to {most:,}")
    return value


def _real(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise UserError(f"config.json: {key}: {_shown(value)} is not a number from 0 up")
    return value


def _flag(get: Get, key: str, *default: bool) -> bool:
    value = get(key, *default)
    if type(value) is not bool:
        raise UserError(f"config.json: {key}: {_shown(value)} is not true or false")
    return value


def _check_dtype(get: Get) -> None:
    """The type of the files, whose name before transformers 5 is `torch_dtype`. Old and new engines read either."""
    names = {key: get(key, None) for key in ("dtype", "torch_dtype") if get(key, None) is not None}
    for key, name in names.items():
        if not isinstance(name, str) or not isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
            raise UserError(f"config.json: {key}: {_shown(name)} is not a type; e.g. 'bfloat16'")
    if len({name.removeprefix("torch.") for name in names.values()}) > 1:
        raise UserError(f"config.json: dtype {names['dtype']} and torch_dtype {names['torch_dtype']} differ; keep one")


def _shown(value: Any) -> str:
    return short(repr(value), 80)


def _only(value: Any, found: Any, key: str, architecture: str) -> None:
    if found != value:
        raise UserError(f"config.json: {key}: {_shown(found)} is not supported for {architecture}; only {value!r}")


def _experts(get: Get) -> Experts:
    """transformers 5 writes the number of experts under another name than the published configs."""
    count = _whole(get, "num_experts" if get("num_local_experts", None) is None else "num_local_experts")
    chosen = _whole(get, "num_experts_per_tok")
    if chosen > count:
        raise UserError(f"config.json: num_experts_per_tok: {chosen} is more than the {count} experts")
    return Experts(count, chosen, _whole(get, "moe_intermediate_size"), _flag(get, "norm_topk_prob"))


def _rope(get: Get, architecture: str, positions: int) -> Rope:
    """transformers 5 writes one `rope_parameters`; older releases write `rope_theta` and `rope_scaling`."""
    older, newer = get("rope_scaling", {}), get("rope_parameters", {})
    for key, found in (("rope_scaling", older), ("rope_parameters", newer)):
        if not isinstance(found, dict):
            raise UserError(f"config.json: {key}: {_shown(found)} is not a mapping")
    if older and newer and older != newer:  # transformers and the engines do not agree which one counts
        raise UserError("config.json: rope_scaling and rope_parameters differ; keep only one of them")
    values = {key: value for key, value in (older or newer).items() if value is not None}
    name = "rope_scaling" if older else "rope_parameters"
    kinds = [values.pop("rope_type", None), values.pop("type", None)]
    kind = kinds[0] or kinds[1] or "default"
    if kind not in KINDS or any(isinstance(value, dict) for value in values.values()):
        what = _shown(kind) if kind not in KINDS else "one for each layer type"
        raise UserError(f"config.json: {name}: {what} is not supported; only {', '.join(KINDS)}")
    theta = _real("rope_theta", values.pop("rope_theta", get("rope_theta", 10000.0)))
    partial = values.pop("partial_rotary_factor", get("partial_rotary_factor", 1.0))
    _only(1.0, partial, "partial_rotary_factor", architecture)
    if "original_max_position_embeddings" in KINDS[kind]:
        trained = values.get("original_max_position_embeddings", positions)
        values["original_max_position_embeddings"] = get("original_max_position_embeddings", trained)
    for key in KINDS[kind]:
        if key not in values:
            raise UserError(f"config.json: {name}: {kind!r} needs {key}")
    for key, value in values.items() if kind != "default" else ():
        if type(value) is not bool:  # YaRN's `truncate`
            _real(f"{name}: {key}", value)
    if not theta or not values.get("factor", 1) or not values.get("original_max_position_embeddings", 1):
        raise UserError(f"config.json: {name}: a base, factor or length of 0 has no frequencies")
    return Rope(float(theta), kind, tuple(sorted(values.items())) if kind != "default" else ())
