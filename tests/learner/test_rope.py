"""Every kind of rotary embedding that the trainer accepts, in the learner against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megarl.bench.common.models import LLAMA3
from megarl.bench.parity import reference, samples, settings, split
from megarl.models.rope import KINDS, rotary
from megarl.runtime.spawn import spawn
from tests.support.tiny_models import shape_of

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}
SIZES = {
    "vocab_size": 510, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.08,
}  # fmt: skip
DEADLINE = 240.0


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_scale_are_transformers(kind: str) -> None:
    """Its rotary module is the other source; the regimes of Llama 3 and YaRN all occur at these sizes."""
    config = LlamaConfig(**SIZES, rope_parameters=dict(ROPES[kind]))
    wanted = LlamaRotaryEmbedding(config)
    found = rotary(shape_of(config))
    torch.testing.assert_close(found.frequencies, wanted.inv_freq, rtol=1e-6, atol=0)
    assert found.softmax_scale == pytest.approx(16**-0.5 * wanted.attention_scaling**2)
    assert (found.softmax_scale != 16**-0.5) == (kind == "yarn")


def _gradients(folders: list[Path]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Runs on the rank: loss and gradients of the same sequences, model by model."""
    from megarl.learner.learner import Learner, sft_objective
    from megarl.learner.parallel import start

    found = []
    for folder in folders:
        chosen = settings(folder, {})
        world = start(chosen.parallel, chosen.precision, chosen.seed, DEADLINE)
        learner = Learner(chosen, world, total_updates=1)
        loss = learner.accumulate(split(samples(), 1, 2), sft_objective)["loss"]
        found.append((loss, {name: tensor.clone() for name, tensor in learner.named_gradients()}))
        world.release()
    return found


@pytest.mark.slow
@pytest.mark.parallel
def test_loss_and_every_gradient_match_transformers(tmp_path: Path) -> None:
    """Linear and YaRN scaling, in float32 on the CPU. Not proven: Transformer Engine's kernels. `bench parity` has the
    other kinds, under every layout."""
    wanted = []
    for kind in ("linear", "yarn"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dict(ROPES[kind]))).float()
        model.save_pretrained(tmp_path / kind)
        wanted.append(reference(model, samples()))
    found = spawn(_gradients, 1, ([tmp_path / "linear", tmp_path / "yarn"],), DEADLINE)[0]
    assert wanted[0][0] != pytest.approx(wanted[1][0], rel=1e-4)  # the kinds differ
    for (loss, gradients), (wanted_loss, wanted_gradients) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=2e-6)
        for name, gradient in wanted_gradients.items():
            assert (gradients[name] - gradient).abs().max() < 2e-5 * gradient.abs().max(), name
