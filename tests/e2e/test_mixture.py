"""The loop on a random mixture of experts: rolled out by the embedded engine, trained by Megatron's expert layers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import runs

from megarl import config
from megarl.bench.models import write_model

pytestmark = [pytest.mark.e2e, pytest.mark.parallel]


def settings(folder: Path, *more: str) -> config.Settings:
    """Two steps of a random Qwen3-MoE with the quick start's vocabulary; about half of its responses are right."""
    return runs.settings(
        folder / "run", f"model.path={folder / 'model'}", "reward.function=tests.e2e.graders:odd",
        "reward.shaping=none", "pruning.completions=0", "optimizer.lr=1e-2", "parallel={}", *more,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", "qwen3_moe", tied=True, vocab_size=36, num_hidden_layers=3)
    for file in (runs.QUICKSTART / "reasoner").glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    return tmp_path


AUXILIARY = "experts={router_load_balancing_type: seq_aux_loss, aux_loss_coeff: 0.01, z_loss_coeff: 1e-3}"


@pytest.mark.parametrize(("more", "ranks"), [([], 1), (["parallel.ep=2", AUXILIARY], 2)])
def test_the_embedded_engine_rolls_out_a_mixture_of_experts(folder: Path, more: list[str], ranks: int) -> None:
    """What is sampled is what is trained, also after an update that moved the weights: log-probs differ by rounding."""
    for line in runs.run(settings(folder, *more), ranks):
        assert ("load_balance" in line and 0.8 < line["load_balance"] < 4) == (AUXILIARY in more)
        assert line["mismatch_max"] < 1e-4 and line["tokens_trained"] > 100 and line["grad_norm"] > 0, line
        assert line["accuracy"] not in (0, 1)
