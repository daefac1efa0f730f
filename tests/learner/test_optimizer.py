"""The optimizer obeys the run's settings: what decays, and whose settings count after a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.bench.common.learners import new_learner, samples, settings, split
from megarl.bench.common.models import write_model
from megarl.learner import checkpoint
from megarl.learner.learner import sft_objective
from megarl.runtime.spawn import spawn
from megarl.types import Batch

DEADLINE = 240.0
RATE, DECAY = 0.1, 0.5


def _weights(learner: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.named_tensors()}


def _decay(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Runs on the rank: the weights before and after an update without gradient."""
    learner = new_learner(settings(folder, optimizer={"lr": RATE, "weight_decay": DECAY, "warmup_steps": 0}))
    before = _weights(learner)
    silent = [sample.__class__(sample.token_ids, sample.response_start, 0.0) for sample in samples()]
    learner.train_step(split(silent, 1, 2), sft_objective)
    after = _weights(learner)
    learner.world.release()
    return before, after


@pytest.mark.parallel
def test_matrices_decay_and_norms_and_biases_do_not(tmp_path: Path) -> None:
    """Without a gradient AdamW only multiplies by 1 - rate * decay. Qwen2 has biases; norms are vectors too."""
    write_model(tmp_path, "qwen2", tied=True)
    before, after = spawn(_decay, 1, (tmp_path,), DEADLINE)[0]
    kinds = {tensor.dim() for tensor in before.values()}
    assert kinds == {1, 2} and any(name.endswith("bias") for name in before)
    for name, tensor in before.items():
        wanted = tensor if tensor.dim() == 1 else tensor * (1 - RATE * DECAY)
        torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=0, msg=name)


def _resumed(folder: Path, saved: Path, bare: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs on the rank: what Adam works with after a resume under other settings; warnings of a bare resume."""
    batch: Batch = split(samples(), 1, 2)
    first = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.5, 0.6), "eps": 1e-3}
    for place, kept in ((saved, True), (bare, False)):
        learner = new_learner(settings(folder, optimizer=first, checkpoint={"optimizer": kept}))
        learner.train_step(batch, sft_objective)
        checkpoint.save(learner, place)
        learner.world.release()
    second = {"lr": 0.2, "weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-5, "warmup_steps": 0}
    learner = new_learner(settings(folder, optimizer=second), total_updates=5)
    checkpoint.load(learner, saved)
    learner.train_step(batch, sft_objective)
    names = "weight_decay", "betas", "eps"
    groups = [{name: group[name] for name in names} for group in learner.optimizer.param_groups]
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megarl").addHandler(handler)
    checkpoint.load(learner, bare)
    learner.world.release()
    return groups, records


@pytest.mark.slow
@pytest.mark.parallel
def test_a_resumed_run_takes_its_own_settings(tmp_path: Path) -> None:
    """Not the checkpoint's. A checkpoint without optimizer state says that Adam starts from zero."""
    model, saved, bare = (tmp_path / name for name in ("model", "saved", "bare"))
    write_model(model, tied=True)
    saved.mkdir()
    bare.mkdir()
    groups, records = spawn(_resumed, 1, (model, saved, bare), DEADLINE)[0]
    assert groups == [{"weight_decay": 0.0, "betas": (0.8, 0.9), "eps": 1e-5}] * len(groups) and groups
    assert [line for line in records if str(bare) in line and "Adam starts from zero" in line], records
