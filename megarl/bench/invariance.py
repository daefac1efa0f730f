"""One batch, split many ways: the gradient is the same for any layout, row capacity, micro-batches and order."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from megarl.algorithms.loss import policy_loss
from megarl.algorithms.presets import Switches
from megarl.bench.common import result
from megarl.bench.common.learners import TIMEOUT, new_learner, settings
from megarl.bench.common.models import Sizes, write_model
from megarl.bench.parity import LAYOUTS
from megarl.runtime.spawn import spawn
from megarl.types import Batch, Sample

VOCAB = 126
SIZES: Sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
BATCHES = 4  # different batches and losses, taken in turn
PLAIN = Switches("grpo", "token", "token_mean", 1.0, 0.2, 0.2, dynamic_sampling=False, old_logprobs="recompute")


@dataclass(frozen=True)
class Draw:
    """A random way to compute the gradient of batch number `batch`."""

    number: int
    layout: str
    ranks: int
    parallel: dict[str, Any]
    capacity: int  # largest number of positions in a row
    batch: int
    rows: tuple[tuple[int, ...], ...]  # samples of each micro-batch, before they are dealt to the data-parallel ranks


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    draws: Annotated[int, typer.Option(help="Random ways to split the work.")] = 24,
) -> None:
    """Largest gradient difference over the largest gradient, per tensor, against one sequence a row at tp1."""
    result.publish("invariance", measure([draw(number) for number in range(draws)]), json)


def measure(draws: list[Draw]) -> list[dict[str, Any]]:
    """One row per draw."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, tied=True, **SIZES)
        batches = sorted({d.batch for d in draws})
        references = dict(zip(batches, spawn(_references, 1, (model, batches), TIMEOUT)[0], strict=True))
        rows = []
        for ranks in sorted({d.ranks for d in draws}):
            group = [d for d in draws if d.ranks == ranks]
            rows += spawn(_differences, ranks, (model, group, references), TIMEOUT)[0]
    return sorted(rows, key=lambda row: row["draw"])


def draw(number: int) -> Draw:
    """Draw number `number`: a layout, and the samples of a batch shuffled into rows of a random capacity."""
    rng = np.random.default_rng((1, number))
    names = list(LAYOUTS)
    layout = names[(number * 7 + int(rng.integers(len(names)))) % len(names)]
    ranks, parallel = LAYOUTS[layout]
    samples, _ = batch(number % BATCHES)
    capacity = int(rng.integers(max(s.input_length for s in samples), 1 + sum(s.input_length for s in samples)))
    rows: list[list[int]] = []
    for i in rng.permutation(len(samples)).tolist():
        if not rows or sum(samples[j].input_length for j in rows[-1]) + samples[i].input_length > capacity:
            rows.append([])
        rows[-1].append(i)
    return Draw(number, layout, ranks, parallel, capacity, number % BATCHES, tuple(map(tuple, rows)))


def batch(number: int) -> tuple[list[Sample], Switches]:
    """Batch number `number`: random lengths, weights (some 0), advantages and log-probs, under a random loss."""
    rng = np.random.default_rng((2, number))
    samples = []
    for _ in range(int(rng.integers(6, 10))):
        prompt, n = int(rng.integers(1, 8)), int(rng.integers(1, 40))
        rollout = rng.normal(-4.8, 0.4, n).astype(np.float32)
        rollout[rng.random(n) < 0.2] = np.nan
        samples.append(
            Sample(
                rng.integers(0, VOCAB, prompt + n).astype(np.int32),
                prompt,
                scale=float(rng.choice([0.0, rng.uniform(0.5, 4.0) / 100], p=[0.2, 0.8])),
                advantage=float(rng.normal()),
                sampled=~np.isnan(rollout),
                rollout_logprobs=rollout,
                old_logprobs=rng.normal(-4.8, 0.4, n).astype(np.float32) if number % 2 else None,
                ref_logprobs=rng.normal(-4.8, 0.4, n).astype(np.float32),
            )
        )
    switches = replace(
        PLAIN,
        ratio=("token", "sequence", "cispo")[number % 3],
        entropy_coef=float(rng.uniform(0.0, 0.1)),
        kl_loss_coef=float(rng.uniform(0.0, 0.5)),
        tis_cap=2.0 if number % 2 else None,
    )
    return samples, switches


def gradient(learner: Any, number: int, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The gradient of batch `number` by a learner that computes it in `rows`. Collective."""
    samples, switches = batch(number)
    replicas = learner.world.dp_size
    rows = rows + [[]] * (-len(rows) % replicas)
    work = Batch(samples, [rows[r::replicas] for r in range(replicas)], len(samples), 100.0)
    learner.accumulate(work if learner.world.is_controller else None, partial(policy_loss, switches=switches))
    return {name: tensor.clone() for name, tensor in learner.named_gradients()}


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over the largest entry, the largest of all tensors."""
    return max((found[name] - g).abs().max().item() / g.abs().max().item() for name, g in wanted.items())


def one_by_one(number: int) -> list[list[int]]:
    """Each sample of batch `number` in its own row."""
    return [[i] for i in range(len(batch(number)[0]))]


def _references(model: Path, batches: list[int]) -> list[dict[str, torch.Tensor]]:
    learner = new_learner(settings(model))
    return [gradient(learner, number, one_by_one(number)) for number in batches]


def _differences(
    model: Path, draws: list[Draw], references: dict[int, dict[str, torch.Tensor]]
) -> list[dict[str, Any]]:
    found = []
    for d in draws:
        learner = new_learner(settings(model, d.parallel))
        here = gradient(learner, d.batch, [list(row) for row in d.rows])
        learner.world.release()
        found.append(
            {
                "draw": d.number,
                "layout": d.layout,
                "ranks": d.ranks,
                "batch": d.batch,
                "capacity": d.capacity,
                "rows": len(d.rows),
                "rel_grad": difference(here, references[d.batch]),
            }
        )
    return found
