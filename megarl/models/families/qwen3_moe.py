"""Qwen3 mixture of experts: Qwen3's attention, a router and experts in every layer, no shared expert."""

from megarl.models.families.family import MODEL, Family
from megarl.models.families.qwen3 import ATTENTION
from megarl.models.rules import expert_down, expert_gate_up, router

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    qk_norm=True,
    defaults={"norm_topk_prob": False, "num_key_value_heads": 4},
    required={
        "attention_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    model=MODEL,
    layer=(*ATTENTION, router("mlp.router.weight", "mlp.gate.weight")),
    expert=(
        expert_gate_up("linear_fc1.weight", "{x}_proj.weight"),
        expert_down("linear_fc2.weight", "down_proj.weight"),
    ),
)
