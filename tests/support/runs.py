"""Small real runs for the end-to-end tests: the quick start's model and problems, a few prompts a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl import config
from megarl.run.directory import read_metrics
from megarl.runtime.spawn import spawn
from megarl.train import train

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
DEADLINE = 280.0


def settings(run: Path, *overrides: str) -> config.Settings:
    """The quick start's, cut down: 4 prompts of 4 completions, 48 tokens, no evaluation unless asked for."""
    small = [
        f"run={run}",
        f"model.path={QUICKSTART / 'reasoner'}",
        f"data.train=[{QUICKSTART / 'problems' / 'train.jsonl'}]",
        "data.eval=[]",
        "batch={prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}",
        "rollout.max_response_tokens=48",
        "steps=2",
        "checkpoint.every=0",
        "collective_timeout=120",
        "rollout.timeout=120",
    ]
    return config.load(QUICKSTART / "train.yaml", [*small, *overrides])


def run(
    wanted: config.Settings, nproc: int | None = None, resume: bool = False, deadline: float = DEADLINE
) -> list[dict[str, Any]]:
    """Train, and return the metrics without their timings."""
    spawn(train, nproc or wanted.parallel.model_ranks, (wanted, resume), deadline)
    return untimed(read_metrics(wanted.run))


def untimed(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(("seconds_", "memory_"))} for line in metrics]
