"""A byte-level tokenizer and a tiny random Qwen3 in Hugging Face's layout: what engine tests run on."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MERGES = [("W", "a"), ("i", "t"), ("Wa", "it"), ("i", "n"), ("in", "g"), ("Ġ", "Wait"), ("t", "h"), ("th", "e")]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, a few merges (markers are one token, several, or part of a word), two special tokens."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocabulary.setdefault(left + right, len(vocabulary))
    core = Tokenizer(models.BPE(vocabulary, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")


def make_model(folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Qwen3ForCausalLM:
    """Write tokenizer, configuration and random weights (head_dim 32: the least that vLLM's CPU attention takes)."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,  # not too near uniform: a wrong weight shows in the log-probs
    )
    model = Qwen3ForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def reference_logprobs(model: Qwen3ForCausalLM, token_ids: list[int]) -> list[float]:
    """transformers' log-probs of token_ids[1:]."""
    table = model(torch.tensor([token_ids])).logits.float().log_softmax(-1)[0]
    return [table[i - 1, token_ids[i]].item() for i in range(1, len(token_ids))]
