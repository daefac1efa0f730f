"""The embedded engine's cache must fit into a device's free memory: refused before anything is allocated."""

from __future__ import annotations

import pytest
import torch

from megarl.errors import UserError
from megarl.models.shape import Experts, ModelShape
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.local.decoder import Decoder
from megarl.rollout.local.engine import LocalEngine

SHAPE = ModelShape(layers=3, hidden=32, heads=4, kv_groups=2, head_dim=8, ffn=48, vocab=60, qk_norm=True)
MOE = ModelShape(
    layers=3, hidden=32, heads=4, kv_groups=2, head_dim=8, ffn=48, vocab=60, moe=Experts(4, 2, 16), family="qwen3_moe"
)
WEIGHTS, EACH = 2 * SHAPE.parameters(), SHAPE.cache_bytes(0, 500, 2)


@pytest.mark.parametrize("shape", [SHAPE, MOE])
def test_the_formula_is_what_is_allocated(shape: ModelShape) -> None:
    """Keys, values and recorded experts, of an engine of 7 sequences of 50 tokens."""
    cache = Decoder(shape, torch.device("cpu"), torch.float32, 7 + 1, 50, True).cache
    allocated = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values, cache.experts))
    assert shape.cache_bytes(7, 50, 4, experts=True) == allocated


@pytest.mark.parametrize(
    ("free", "words"),
    [
        (WEIGHTS + 65 * EACH - 1, r"local_max_sequences: 64 sequences of 500 tokens .*nearest value that fits: 63"),
        (WEIGHTS + 11 * EACH, "nearest value that fits: 10"),
        (WEIGHTS + EACH, "none fits; use rollout.engine=sglang"),
        (0, "none fits; use rollout.engine=sglang"),
    ],
)
def test_a_cache_larger_than_the_free_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, byte_vocabulary: Vocabulary, free: int, words: str
) -> None:
    """Before anything is allocated: there is no such device here."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    with pytest.raises(UserError, match=words):
        LocalEngine(SHAPE, byte_vocabulary, "cuda", torch.bfloat16, batch_slots=64, max_length=500)
