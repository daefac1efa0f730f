"""Qwen2 and Qwen2.5, dense: biases on queries, keys and values only."""

from megarl.models.families.family import MODEL, Family
from megarl.models.rules import attention_output, down, gate_up, norm, qkv

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    defaults={"num_key_value_heads": 32},
    required={"use_sliding_window": False, "hidden_act": "silu"},
    model=MODEL,
    layer=(
        norm("input_layernorm.weight", "input_layernorm.weight"),
        qkv("self_attention.linear_qkv.weight", "self_attn.{x}_proj.weight"),
        qkv("self_attention.linear_qkv.bias", "self_attn.{x}_proj.bias", bias=True),
        attention_output("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
        norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        gate_up("mlp.linear_fc1.weight", "mlp.{x}_proj.weight"),
        down("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
    ),
)
