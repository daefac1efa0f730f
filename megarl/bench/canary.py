"""Weights damaged on the way to the embedded engine: which are caught by checksums and which by the canary.

One tensor at a time is damaged between the learner and the engine: two rows of a matrix are exchanged, one column is
scaled by 1.05, the tensor stays that of the update before, or all rows move by one place. Each sync is checked as
training does (rollout/weights/verify.py), first by checksums, then by the canary alone, as if the engine reported none.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

from megarl.bench.common import result
from megarl.bench.common.learners import new_learner
from megarl.config import Settings, parse
from megarl.errors import RunError
from megarl.runtime.spawn import spawn

TIMEOUT = 4 * 3600.0
RATE = 1e-6  # of the update before which a stale tensor stayed
ASKED = "What is 2 times 5?"
SABOTAGES = ("rows_exchanged", "column_scaled", "stale")

Tensors = dict[str, torch.Tensor]
Damage = tuple[str, str, torch.Tensor]  # kind, tensor's name, what the engine gets


def main(
    model: Annotated[Path, typer.Option(help="A model folder.")],
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    sabotages: Annotated[int, typer.Option(min=1, help="Of the first three kinds, in turn.")] = 200,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of learner and engine.")] = "bf16",
    tokens: Annotated[int, typer.Option(min=1, help="Length of the canary's answer.")] = 64,
    seed: int = 0,
) -> None:
    """One row a kind; `none` is the clean sync before and after the update.

    `caught`: the sync is refused. `named`: by checksums, and the error names the tensor. `by_canary`: the canary alone
    refuses it too. `canary_ratio`: the median difference over what rounding explains; the canary allows 3.
    """
    settings = parse(
        {
            "run": "runs/canary",
            "model": {"path": str(model)},
            "data": {"train": []},
            "precision": {"dtype": dtype},
            "optimizer": {"lr": RATE, "warmup_steps": 0, "decay": "constant"},
            "batch": {"tokens_per_row": 2048},
            "rollout": {"max_response_tokens": tokens},
        }
    )
    [rows] = spawn(_measure, 1, (settings, sabotages, seed), TIMEOUT)
    result.publish("canary", rows, json, model=model.name, dtype=dtype, tokens=tokens)


class DamagedOnTheWay:
    """An engine that gets `damage` instead of the tensor that was sent."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.damage = engine, dict[str, torch.Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        arriving = ((name, self.damage.get(name, tensor)) for name, tensor in tensors)
        return await self._engine.update_weights(version, arriving)  # type: ignore[no-any-return]


def damages(rng: np.random.Generator, before: Tensors, now: Tensors, count: int) -> Iterator[Damage]:
    """`count` sabotages of the three kinds in turn, and a tenth as many matrices whose rows all move by one place."""
    matrices = [name for name, tensor in now.items() if tensor.ndim == 2]
    changed = [name for name in now if not torch.equal(now[name], before[name])]
    for i in range(count):
        kind = SABOTAGES[i % len(SABOTAGES)]
        name = str(rng.choice(changed if kind == "stale" else matrices))
        yield kind, name, before[name] if kind == "stale" else _damaged(rng, kind, now[name])
    for _ in range(math.ceil(count / 10)):
        name = str(rng.choice(matrices))
        yield "rows_moved", name, now[name].roll(1, 0)


def _damaged(rng: np.random.Generator, kind: str, tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.clone()
    while torch.equal(found, tensor):  # equal rows, or a column of zeros, would be no damage
        if kind == "rows_exchanged":
            i, j = rng.choice(len(tensor), 2, replace=False).tolist()
            found[[i, j]] = tensor[[j, i]]
        else:
            found[:, int(rng.integers(tensor.shape[1]))] *= 1.05
    return found


def _measure(settings: Settings, count: int, seed: int) -> list[dict[str, Any]]:
    from megarl.learner.learner import sft_objective
    from megarl.loop import canaries
    from megarl.models.tokenizer import load_tokenizer
    from megarl.rollout.engine import Sampling
    from megarl.rollout.local.engine import LocalEngine
    from megarl.rollout.weights import verify
    from megarl.types import Batch, Sample

    learner, tokenizer, loop = new_learner(settings), load_tokenizer(settings.model.path), asyncio.new_event_loop()
    prompt = tokenizer(ASKED)["input_ids"]
    dtype = torch.float32 if settings.precision.dtype == "fp32" else torch.bfloat16
    length = len(prompt) + settings.rollout.max_response_tokens
    engine = DamagedOnTheWay(LocalEngine(settings.model.path, tokenizer, dtype=dtype, max_length=length, batch_slots=1))
    before = {name: tensor.clone() for name, tensor in learner.named_tensors()}
    loop.run_until_complete(verify.send(engine, 0, before.items()))
    sampling = Sampling(settings.rollout.max_response_tokens, temperature=0.0)
    answer = loop.run_until_complete(engine.generate(prompt, sampling, "canary/0|0")).token_ids
    tokens = np.array([*prompt, *answer], np.int32)

    def synced(tensors: Tensors) -> tuple[str, str, float]:
        """The complaints of the checksums and of the canary ("" for none), and the canary's ratio."""
        complaints = ["", ""]
        try:
            loop.run_until_complete(verify.send(engine, 1, tensors.items()))
        except RunError as error:
            complaints[0] = str(error)
        try:
            loop.run_until_complete(verify.check(engine, 1, canary))
        except RunError as error:
            complaints[1] = str(error)
        scored = loop.run_until_complete(engine.score(canary.token_ids))[-len(canary.logprobs) :]
        ratios = (np.array(scored) - canary.logprobs) / canary.scale()
        return complaints[0], complaints[1], float(np.sqrt(np.mean(ratios**2)))

    canary = canaries.measure(learner, tokens, len(prompt))
    found: list[tuple[str, str, tuple[str, str, float]]] = [("none", "", synced(before))]
    sample = Sample(tokens, len(prompt), 1.0 / len(answer))
    learner.train_step(Batch([sample], [[[0]]], 1.0, float(len(tokens))), sft_objective)
    now = {name: tensor.clone() for name, tensor in learner.named_tensors()}
    canary = canaries.measure(learner, tokens, len(prompt))
    found.append(("none", "", synced(now)))
    for kind, name, tensor in damages(np.random.default_rng(seed), before, now, count):
        engine.damage = {name: tensor}
        found.append((kind, name, synced(now)))
    return [_row(kind, [each for each in found if each[0] == kind]) for kind in dict.fromkeys(k for k, *_ in found)]


def _row(kind: str, found: list[tuple[str, str, tuple[str, str, float]]]) -> dict[str, Any]:
    return {
        "kind": kind,
        "syncs": len(found),
        "caught": sum(bool(checksums or canary) for _, _, (checksums, canary, _) in found),
        "named": sum(bool(name) and f" {name} " in checksums for _, name, (checksums, _, _) in found),
        "by_canary": sum(bool(canary) for _, _, (_, canary, _) in found),
        "canary_ratio": float(np.median([ratio for _, _, (_, _, ratio) in found])),
    }


if __name__ == "__main__":
    typer.run(main)
