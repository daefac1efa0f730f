"""Qwen3, dense: norms on queries and keys, no biases."""

from megarl.models.families.family import MODEL, Family
from megarl.models.rules import attention_output, down, gate_up, head_norm, norm, qkv

ATTENTION = (
    norm("input_layernorm.weight", "input_layernorm.weight"),
    qkv("self_attention.linear_qkv.weight", "self_attn.{x}_proj.weight"),
    head_norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    head_norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    attention_output("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    qk_norm=True,
    defaults={"head_dim": 128, "num_key_value_heads": 32},
    required={"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"},
    model=MODEL,
    layer=(
        *ATTENTION,
        gate_up("mlp.linear_fc1.weight", "mlp.{x}_proj.weight"),
        down("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ),
)
