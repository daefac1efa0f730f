"""Random models and layouts that fit each other, for property tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from megarl.models.families import FAMILIES
from megarl.models.layout import Layout
from megarl.models.rules import Spec

LAYOUTS = [
    Layout(tp, pp, vpp, ep)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    for vpp in (1, 2)
    for ep in (1, 2)
    if pp > 1 or vpp == 1
]


@dataclass(frozen=True)
class Case:
    family: str
    sizes: dict[str, Any]  # for tiny_models
    layout: Layout
    spec: Spec
    dtype: torch.dtype


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Down to one key/value head a rank, vocabularies far from a multiple of anything, every type and layout."""
    layout = draw(st.sampled_from(LAYOUTS))
    family = draw(st.sampled_from(sorted(FAMILIES) if layout.ep == 1 else ["qwen3_moe"]))
    groups = layout.tp * draw(st.integers(1, 2))
    sizes = {
        "num_hidden_layers": layout.pp * layout.vpp * draw(st.integers(1, 2)),
        "hidden_size": 8 * groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "num_attention_heads": groups * draw(st.sampled_from([1, 2, 4])),
        "intermediate_size": layout.tp * draw(st.integers(1, 9)),
        "vocab_size": draw(st.integers(layout.tp, 67)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family == "qwen2":
        sizes["hidden_size"] = sizes["num_attention_heads"] * draw(st.sampled_from([2, 4]))
    else:
        sizes["head_dim"] = draw(st.sampled_from([2, 6, 8]))
    if family == "qwen3_moe":
        experts = {"num_experts": 2 * draw(st.integers(1, 3)), "num_experts_per_tok": 1}
        sizes |= experts | {"moe_intermediate_size": layout.tp * draw(st.integers(1, 5))}
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Case(family, sizes, layout, draw(st.sampled_from(["local", "te"])), dtype)
