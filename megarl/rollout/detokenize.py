"""The bytes that each token id adds to the text: exact also when two tokens share a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megarl.errors import UserError
from megarl.models.files.regular import read_json, short


class Vocabulary:
    """A tokenizer for token ids: their bytes, the text of a sequence, the ids of a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int] = ()) -> None:
        """`end_ids` are further end-of-text tokens (a chat model's generation_config.json may name several)."""
        self.tokenizer = tokenizer
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *end_ids)))

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each id adds inside a text. Joined over a sequence they are its text in UTF-8 (tokenizers
        that put blanks between words add one at the start, which decoding drops)."""
        return _pieces(self.tokenizer)

    def bytes_of(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of a sequence. Ids beyond the tokenizer (padding of the model's vocabulary) have none."""
        known = len(self.pieces)
        return b"".join(self.pieces[i] for i in token_ids if i < known)

    def text(self, token_ids: Sequence[int]) -> str:
        """The whole text with special tokens. A character that is cut in half is U+FFFD."""
        return _decode(self.tokenizer, token_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` inside a sequence: without special tokens at its ends."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    names = {i: name for name, i in tokenizer.get_vocab().items()}
    size = max(names) + 1
    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    kinds = _decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        plain = {i: bytes(_BYTE_OF[c] for c in name) for i, name in names.items() if i not in added}
        return [added.get(i) or plain.get(i, b"") for i in range(size)]
    # Any other tokenizer: the text that an id adds behind an ordinary token.
    anchor = next(i for i in sorted(names) if i not in added and _decode(tokenizer, [i]).strip().isalnum())
    before = _decode(tokenizer, [anchor])
    texts = [_decode(tokenizer, [anchor, i]) for i in range(size)]
    pieces = [text[len(before) :].encode() if text.startswith(before) else text.encode() for text in texts]
    if "ByteFallback" in kinds:
        for i, name in names.items():
            if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
                pieces[i] = bytes([int(byte[1], 16)])
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The types of a fast tokenizer's decoder and its parts; empty for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend else None
    return {part["type"] for part in (decoder or {}).get("decoders", [decoder] if decoder else [])}


def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte-level alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_of_char()


@lru_cache(maxsize=4)
def vocabulary_of(tokenizer: PreTrainedTokenizerBase, model: Path) -> Vocabulary:
    """The vocabulary of a model's tokenizer, with the end-of-text tokens that its generation_config.json names."""
    return Vocabulary(tokenizer, end_ids(model / "generation_config.json"))


def end_ids(file: Path) -> list[int]:
    """The end-of-text tokens that a generation_config.json names; none if there is no such file."""
    settings = read_json(file) if file.exists() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{file}: is a {type(settings).__name__}, not a mapping of settings")
    named = settings.get("eos_token_id")
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(each) is int and 0 <= each < 2**31 for each in ids):
        raise UserError(f"{file}: eos_token_id: {short(repr(named), 80)} is not a token id or a list of them")
    return ids
