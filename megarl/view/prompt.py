"""One prompt as the model gets it, for a line on the terminal: its text, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

TEXT, TOKENS = 400, 24  # characters, and tokens, of each end that are shown


def text_of(text: str) -> str:
    """The text in quotes, its line ends and control characters as escapes; of a long one both ends."""
    if len(text) <= 2 * TEXT:
        return repr(text)
    return f"{text[:TEXT]!r} … {len(text) - 2 * TEXT} more characters … {text[-TEXT:]!r}"


def tokens_of(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Each token's id and text; of many both ends."""

    def written(ids: Sequence[int]) -> str:
        return "  ".join(f"{i} {tokenizer.decode([i])!r}" for i in ids)

    if len(token_ids) <= 2 * TOKENS:
        return f"{len(token_ids)}: {written(token_ids)}"
    left_out = len(token_ids) - 2 * TOKENS
    return f"{len(token_ids)}: {written(token_ids[:TOKENS])}  … {left_out} more …  {written(token_ids[-TOKENS:])}"
