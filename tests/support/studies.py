"""Small scaling studies, and `megarl scaling` in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

Tool = Callable[..., str]
TRAINED = {
    "name": "tiny", "how": "local", "base": "examples/quickstart/train.yaml", "skip": 0, "y": ["grad_norm"],
    "settings": {
        "steps": 1, "parallel.tp": 1, "data.eval": [], "checkpoint.every": 0, "batch.prompts_per_step": 2,
        "rollout.max_response_tokens": 24,
    },
    "vary": {"batch.completions_per_prompt": [2, 4]}, "x": "batch.completions_per_prompt",
}  # fmt: skip
SOME = {
    "name": "some", "how": "predicted", "base": "examples/scaling/qwen3_32b/run.yaml", "x": "gpus", "y": ["mfu"],
    "vary": {"gpus": [32, 64, 128, 256]},
}  # fmt: skip
LINE = {
    "seconds_total": 10.0, "seconds_evaluation": 6.0, "seconds_rollout": 2.0, "seconds_train": 1.0,
    "seconds_logprobs": 1.0, "seconds_sync": 0.5, "tokens_generated": 400, "tokens_trained": 100, "reward": 0.5,
    "response_tokens": 9.0, "packing_density": 0.9, "effective_sample_size": 8.0, "grad_norm": 1.0,
}  # fmt: skip
"""Metrics of one step."""


def write(folder: Path, tree: dict) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file
