"""Fixtures of the rollout tests."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.local.engine import LocalEngine
from tests.support.tiny_models import shape_of
from tests.support.tiny_rollout import SIZES, byte_level_tokenizer, randomise, word_tokenizer


@pytest.fixture(scope="session")
def byte_vocabulary() -> Vocabulary:
    merges = [
        "W a",
        "i t",
        "Wa it",
        "Ġ Wait",
        "Ċ Ċ",
        "ĊĊ Wait",
        "it ing",
        "i n",
        "in g",
        "Wait ing",
        "Ġ a",
        ". Ġ",
        "Ġ Wa",
    ]
    return Vocabulary(byte_level_tokenizer(merges))


@pytest.fixture(scope="session")
def qwen3():
    """A random Qwen3 of 64 tokens in float32, and its configuration."""
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, num_hidden_layers=2, tie_word_embeddings=True)
    return randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@pytest.fixture(scope="session")
def words() -> Vocabulary:
    """A vocabulary of 64 one-word tokens, `Wait` = 2 among them."""
    return Vocabulary(word_tokenizer(["Wait", *(f"w{i}" for i in range(61))]))


@pytest.fixture
def make_engine(qwen3, words):
    """A function: LocalEngine of the tiny model, its weights loaded as version 1."""

    async def make(**settings) -> LocalEngine:
        engine = LocalEngine(shape_of(qwen3.config), words, **{"batch_slots": 4, "max_length": 96, **settings})
        await engine.update_weights(1, qwen3.state_dict().items())
        return engine

    return make
