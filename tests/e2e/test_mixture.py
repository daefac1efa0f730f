"""The loop on a random mixture of experts: rolled out by the embedded engine, trained by Megatron's expert layers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megarl import config, launch
from megarl.bench.common.models import write_model
from megarl.errors import UserError
from megarl.run.directory import read_rollouts
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]


def settings(folder: Path, *more: str) -> config.Settings:
    """Two steps of a random Qwen3-MoE with the quick start's vocabulary; about half of its responses are right."""
    return runs.settings(
        folder / "run", f"model.path={folder / 'model'}", "reward.function=tests.support.graders:odd",
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


def test_replayed_routing_closes_the_gap_that_rounding_makes(folder: Path) -> None:
    """In bf16 engine and learner round differently and send some tokens to different experts; the same rollouts,
    trained through the experts of the rollout, differ less. Such a run is not replayed from its record."""
    seen = {}
    for name in ("false", "true"):
        chosen = settings(folder, "precision.dtype=bf16", "parallel.ep=2", "steps=1", f"rollout.replay_routing={name}")
        chosen.run = folder / name
        seen[name] = runs.run(chosen, 2)[0], read_rollouts(chosen.run, 1)
    (free, sampled), (replayed, same) = seen["false"], seen["true"]
    tokens, again = (
        [c.completion.token_ids.tolist() for g in groups for c in g.completions] for groups in (sampled, same)
    )
    assert tokens == again
    assert replayed["mismatch_mean"] < 0.9 * free["mismatch_mean"]
    assert replayed["mismatch_max"] < free["mismatch_max"]
    with pytest.raises(UserError, match="rollout.replay_routing: true, .*does not record .*replay_routing=false"):
        launch.replay(folder / "true", 1, None, None)


def test_a_dense_model_has_no_routing_to_replay() -> None:
    """One line and exit code 2, before anything is loaded."""
    command = [
        sys.executable,
        "-m",
        "megarl.cli",
        "train",
        runs.QUICKSTART / "train.yaml",
        "rollout.replay_routing=true",
    ]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "rollout.replay_routing: true: the model has no experts" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
