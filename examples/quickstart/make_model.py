"""The tiny reasoner's tokenizer and architecture, written in Hugging Face's layout without weights.

    python -m examples.quickstart.make_model examples/quickstart/reasoner

Byte-level: the texts of the tokens simply join up to the text (" 5", " +", " Wait", " \\boxed", "{" …). Every word
is one token and carries the space before it, as in Qwen's tokenizer.
"""

from __future__ import annotations

from pathlib import Path

import typer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from examples.quickstart.search_verify import LARGEST

SPECIAL = ["<pad>", "<eos>", "<unk>"]
WORDS = ["<think>", "</think>", "Wait", "yes", "no", "+", "=", "->", "**Final", "Answer**", "\\boxed", "}"]
NUMBERS = [str(n) for n in range(2 * LARGEST)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """36 tokens: three special ones, the words, the numbers 0 … 19 and "{", which joins the word before it."""
    tokens = [*SPECIAL, *("Ġ" + word for word in WORDS), "{", *("Ġ" + number for number in NUMBERS)]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(Regex(r"\{|Ġ[^Ġ{]*"), behavior="isolated"),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Qwen3 with 0.45 M parameters. head_dim 32 is the smallest that vLLM's CPU attention takes."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        initializer_range=0.08,  # hidden_size ** -0.5: at 0.02 so narrow a model learns far slower
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )


def main(folder: Path) -> None:
    """Write tokenizer files and config.json to FOLDER."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_config(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    typer.run(main)
