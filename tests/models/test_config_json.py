"""config.json is read in one place: every key that changes arithmetic is read or refused, in both dialects."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch

from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.families import FAMILIES, rules
from megarl.models.shape import Rope
from tests.support.tiny_models import config, tiny

WITHOUT_EFFECT = {
    # Names, types, tokens and what a call returns; not the forward pass.
    "transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "id2label", "label2id",
    "problem_type", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "chunk_size_feed_forward", "is_encoder_decoder", "pretraining_tp",
    "sliding_window", "max_window_layers",  # only with use_sliding_window, which must be false
    "attention_dropout", "router_aux_loss_coef",  # of pre-training: RL samples and trains without dropout
}  # fmt: skip


class Recorded(dict[str, Any]):
    """A config.json that remembers which of its keys were looked up."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_key_that_changes_arithmetic_is_read(family: str) -> None:
    """Of all keys that transformers writes for the family, those not read here are listed above with the reason.

    A key that a later transformers adds fails this test until someone reads it, refuses it or lists it.
    """
    from transformers import AutoConfig

    written = AutoConfig.for_model(family, **{k: v for k, v in config(family).items() if k != "model_type"}).to_dict()
    recorded = Recorded(written)
    read_shape(recorded)
    assert written.keys() - recorded.read <= WITHOUT_EFFECT


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shape_agrees_with_transformers(family: str, tmp_path) -> None:
    """A config written by transformers 5 and one in the published (transformers 4) form read as the same shape, and
    the parameter count is that of transformers' model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    published = config(family, tie_word_embeddings=True)
    hf = AutoConfig.for_model(family, **{k: v for k, v in published.items() if k != "model_type"})
    hf.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape == read_shape(published)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    owned = [part.shape for rule in rules(shape) if not rule.copy for part in rule.parts]
    assert shape.parameters() == model.num_parameters() == sum(map(prod, owned))


def test_llama3_rope_scaling_is_kept() -> None:
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    shape = tiny("llama", rope_theta=500000.0, rope_scaling={"rope_type": "llama3", "type": "llama3", **scaling})
    assert shape.rope == Rope(500000.0, "llama3", tuple(scaling.items()))
    newer = config("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling})
    del newer["rope_theta"]
    assert read_shape(newer) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is unknown .known: Qwen3ForCausalLM"),
        ({"use_sliding_window": True}, "use_sliding_window: True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_attention'"),
        ({"attention_bias": True}, "attention_bias: True is not supported for Qwen3ForCausalLM; only False"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling: 'dynamic' .*only default, linear",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one for each layer type"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: 'yarn' needs factor"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}}, "differ; keep only one"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    ],
)
def test_configs_outside_the_map_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_shape(config("qwen3", **change))


def test_a_false_switch_is_not_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family may require true: false is then refused, null and absence are not."""
    monkeypatch.setitem(FAMILIES["llama"].required, "use_norm", True)
    read_shape(config("llama", use_norm=None))
    with pytest.raises(UserError, match="use_norm: False is not supported for LlamaForCausalLM; only True"):
        read_shape(config("llama", use_norm=False))
