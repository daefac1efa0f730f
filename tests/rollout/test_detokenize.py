"""Token ids to bytes: exact for byte-level tokenizers, right for those that put blanks between words."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megarl.errors import UserError
from megarl.rollout.detokenize import Vocabulary, vocabulary_of
from tests.support.tiny_rollout import word_tokenizer


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_joined_pieces_are_the_decoded_text(byte_vocabulary, data):
    """Over random ids, so over characters cut anywhere: the joined bytes decode to what the tokenizer decodes."""
    size = len(byte_vocabulary.pieces)
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=12))
    assert byte_vocabulary.bytes_of(ids).decode(errors="replace") == byte_vocabulary.text(ids)


def test_a_character_cut_in_half_keeps_its_bytes(byte_vocabulary):
    """Decoded one by one the ids of "é等" are replacement characters; their pieces are its bytes."""
    ids = byte_vocabulary.encode("é等")
    assert len(ids) == 5
    assert [byte_vocabulary.pieces[i] for i in ids] == [bytes([b]) for b in "é等".encode()]


def test_words_are_separated(words):
    assert words.bytes_of(words.encode("w3 Wait w4")) == b" w3 Wait w4"
    assert words.pieces[words.tokenizer.eos_token_id] == b" <eos>"


def test_byte_fallback():
    """SentencePiece-like: a blank is U+2581, unknown characters fall back to byte tokens."""
    names = ["<unk>", "▁Wait", "a", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>"))
    assert vocabulary.bytes_of([2, 1, 3 + 0xC3, 3 + 0xA9]) == b"a Wait\xc3\xa9"


def test_ids_beyond_the_tokenizer_have_no_text(words):
    assert words.bytes_of([2, 63, 64, 1000]) == words.pieces[2] + words.pieces[63]


def test_end_ids_are_the_tokenizers_and_the_models():
    assert Vocabulary(word_tokenizer(["a"]), [7, 0]).end_ids == (0, 7)


@pytest.mark.parametrize("named", ["[1, 2", "[]", "7", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}', "\xff"])
def test_a_damaged_generation_config_is_named(tmp_path: Path, named: str) -> None:
    (tmp_path / "generation_config.json").write_text(named, encoding="latin-1")
    with pytest.raises(UserError, match="generation_config.json: ") as caught:
        vocabulary_of(word_tokenizer(["a"]), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("named", "ids"), [([5, 0], (0, 5)), (7, (0, 7)), (None, (0,))])
def test_responses_end_at_the_tokens_of_tokenizer_and_generation_config(
    tmp_path: Path, named: object, ids: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert vocabulary_of(word_tokenizer(["a"]), tmp_path).end_ids == ids
