"""Tiny tokenizers and models for the rollout tests, made in memory."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8,
}  # fmt: skip
"""Of a tiny model of 64 one-word tokens, by config.json's names."""

SPECIALS = ["<eos>", "</think>"]


def byte_level_tokenizer(merges: list[str]) -> PreTrainedTokenizerFast:
    """All 256 bytes, the tokens that `merges` ("W a", "Wa i", …) make, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split()) for merge in merges]
    names = list(dict.fromkeys([*alphabet, *("".join(pair) for pair in pairs)]))
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    return fast


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token a word, joined by blanks when decoded."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIALS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def randomise(model, scale: float = 0.3):
    """Weights large enough that the tokens' probabilities differ, norms and biases that are not trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def named(model) -> dict[str, torch.Tensor]:
    """The weights by the names of Hugging Face's files, where each expert's matrices have names of their own."""
    found = {}
    for name, tensor in model.state_dict().items():
        prefix, stacked, matrix = name.partition(".experts.")
        if not stacked:
            found[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else (matrix,)
        for i, expert in enumerate(tensor):
            for part, piece in zip(parts, expert.chunk(len(parts)), strict=True):
                found[f"{prefix}.experts.{i}.{part}.weight"] = piece
    return found


def teacher_forced(model, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Transformers' log-probs of the response's tokens [n]."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logprobs = (model(ids).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]
