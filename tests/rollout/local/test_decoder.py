"""The decoder's logits against transformers', for every architecture feature it claims."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megarl.rollout.local.decoder import Decoder, Piece
from tests.support.tiny_models import shape_of
from tests.support.tiny_rollout import named, randomise

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3-untied-yarn": Qwen3Config(**SIZES, head_dim=8, rope_parameters=YARN),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, norm_topk_prob=True),
    "qwen3-moe-unscaled": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=False, tie_word_embeddings=True),
    "qwen2.5": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "llama-3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama-mha": LlamaConfig(**(SIZES | {"num_key_value_heads": 4})),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_transformers(name):
    """Prefill of rows of different lengths, a second prefill behind it, then single tokens in scattered slots, at last
    with some that come before them: max |difference| 1e-4 of logits of magnitude 10, float32. bfloat16 and GPUs are
    not covered."""
    torch.manual_seed(1)
    config = CONFIGS[name]
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    decoder = Decoder(shape_of(config), torch.device("cpu"), torch.float32, slots=5, columns=40)
    weights, state = decoder.weights(), named(model)
    assert set(state) - set(weights) <= {"lm_head.weight"}
    for key, weight in weights.items():
        weight.copy_(state[key])
    decoder.refresh()
    ids = torch.randint(0, 50, (2, 30))
    with torch.no_grad():
        expected = model(ids).logits
    slots, zeros = torch.tensor([4, 1]), torch.tensor([0, 0])

    def close(logits, reference):
        torch.testing.assert_close(logits, reference, rtol=0, atol=1e-4)

    first = decoder.logits(decoder.extend(Piece(ids[:, :12], slots, zeros, torch.tensor([12, 9]))))
    close(first[0], expected[0, :12])
    close(first[1, :9], expected[1, :9])
    tokens = torch.stack([ids[0, 12:20], ids[1, 9:17]])
    second = decoder.logits(decoder.extend(Piece(tokens, slots, torch.tensor([12, 9]), torch.tensor([8, 8]))))
    close(second[0], expected[0, 12:20])
    close(second[1], expected[1, 9:17])
    spare = decoder.cache.spare
    for step in range(5):
        columns = torch.tensor([spare, 17 + step, spare, spare, 20 + step])
        fed = torch.tensor([0, int(ids[1, 17 + step]), 0, 0, int(ids[0, 20 + step])])
        logits = decoder.decode(fed, columns, 21 + step)
        close(logits[4], expected[0, 20 + step])
        close(logits[1], expected[1, 17 + step])
    late = Piece(ids[:, 22:27], slots, torch.tensor([25, 22]), torch.tensor([3, 5]))
    late.tokens[0, :3] = ids[0, 25:28]
    columns = torch.tensor([spare, 27, spare, spare, 28])
    logits = decoder.decode(ids[[0, 1, 0, 0, 0], [0, 27, 0, 0, 28]], columns, 29, late=late)
    close(logits[4], expected[0, 28])
    close(logits[1], expected[1, 27])
