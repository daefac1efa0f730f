"""Synthetic run directories, written by the trainer's writer: any number of rollouts of any length and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megarl import config
from megarl.data.ledger import Entry, Fate, Ledger
from megarl.rollout.early_exit.metrics import summarise
from megarl.run import atomic, provenance
from megarl.run.directory import RunDirectory
from megarl.types import Completion, Origin, Probe, Prompt, ScoredCompletion, ScoredGroup, Span

REASONS = ("plain", "think_end", "confident", "budget")


def settings(folder: Path, model: Path, steps: int) -> config.Settings:
    tree: dict[str, Any] = {
        "run": str(folder),
        "steps": steps,
        "model": {"path": str(model)},
        "data": {"train": ["train.jsonl"]},
        "rollout": {"early_exit": {"enabled": True}},
        "pruning": {"completions": 0.5},
    }
    return config.parse(tree)


def completion(prompt: Prompt, index: int, tokens: int, words: list[int], rng: np.random.Generator) -> ScoredCompletion:
    """Random words with the frequencies of natural words, a probe, and inserted tokens after early exits."""
    n = max(12, int(rng.lognormal(np.log(tokens), 0.4)))
    ids = np.array(words, dtype=np.int32)[np.minimum(rng.zipf(1.3, n), len(words)) - 1]
    reason = REASONS[int(rng.integers(len(REASONS)))]
    origin = np.zeros(n, dtype=np.uint8)
    if reason in ("confident", "budget"):
        origin[n - 8 : n - 5] = Origin.INSERTED
    logprobs = np.where(origin == Origin.INSERTED, np.nan, -rng.exponential(0.4, n)).astype(np.float32)
    right = bool(rng.random() < 0.5)
    probes = [Probe(4, tuple(words[:3]), float(rng.random()), False)]
    if reason == "confident":
        probes.append(Probe(n - 8, tuple(words[:3]), 0.97, True))
    made = Completion(
        prompt.uid, index, ids, origin, logprobs, "stop", (Span(0, 0, n // 2), Span(1, n // 2, n)), reason,
        tuple(probes), text="text",
    )  # fmt: skip
    return ScoredCompletion(
        made, "right" if right else "wrong", score=float(right), formatted=True,
        steps=int(rng.integers(1, 9)), reward=float(right), advantage=float(rng.normal()),
        weight=0.0 if rng.random() < 0.3 else 1.0,
    )  # fmt: skip


def write(
    folder: Path, model: Path, steps: int, groups: int, per_group: int = 8, tokens: int = 60,
    question: str = "what is one and one?", answer: str = "42",
) -> Path:  # fmt: skip
    """A finished run of `steps * groups * per_group` rollouts of about `tokens` tokens each.

    The tokens are from the vocabulary of the model at `model`. The same arguments make the same rollouts.
    """
    rng = np.random.default_rng(0)
    known = set(json.loads((model / "tokenizer.json").read_text())["model"]["vocab"].values())
    words = sorted(known)[:4000]
    run = RunDirectory(folder, settings(folder, model, steps), None)
    provenance.write(folder, ranks=1)
    ledger = Ledger()
    run.metrics(0, {"eval/accuracy": 0.25, "eval/response_tokens": 90.5, "eval/completions": 100})
    for step in range(1, steps + 1):
        made = []
        for g in range(groups):
            text = f"problem {step}.{g}: {question}"
            prompt = Prompt(f"{step:04d}{g:04d}", (1, 2, 3), text, answer, f"train.jsonl:{g + 1}")
            made.append(ScoredGroup(prompt, [completion(prompt, i, tokens, words, rng) for i in range(per_group)]))
        run.rollouts(step, made)
        completions = [c for group in made for c in group.completions]
        metrics = {
            "reward": float(np.mean([c.reward for c in completions])),
            "accuracy": float(np.mean([c.score for c in completions])),
            "response_tokens": float(np.mean([len(c.completion) for c in completions])),
            "verdict_right": sum(c.verdict == "right" for c in completions),
            "verdict_wrong": sum(c.verdict == "wrong" for c in completions),
            **summarise(made),
            "tokens_generated": sum(len(c.completion) for c in completions),
            "completions_dropped": sum(c.weight == 0 for c in completions),
            "grad_norm": float(rng.exponential()),
            "mismatch_mean": 1e-6 * (1 + float(rng.random())),
            "loss": float("nan") if step == 1 else float(rng.normal()),
            "memory_gib": 1.5,
            **{f"seconds_{name}": float(rng.random()) for name in ("rollout", "reward", "train", "sync", "total")},
        }
        if step == steps:
            metrics |= {"eval/accuracy": 0.75, "eval/response_tokens": 61.25, "eval/completions": 100}
        run.metrics(step, metrics)
        entries = [Entry(g, step // 3, Fate.TRAINED, per_group, per_group - 1) for g in range(groups)]
        ledger.record_step(step, step - 1, [*entries, Entry(groups + step, step // 3, Fate.PRUNED)])
    run.close()
    partial = atomic.prepare(folder / "checkpoints", steps)
    ledger.commit(partial)
    atomic.commit(folder / "checkpoints", steps, keep=1, warn=print)
    return folder
