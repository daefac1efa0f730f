"""A policy on disk and in memory, and the settings of a run on real servers of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from megarl.config import Settings, parse
from megarl.rollout.servers.pool import Pool
from megarl.rollout.weights.verify import Canary
from tests.support.tiny_policy import make_tokenizer, reference_logprobs

TOKENIZER = make_tokenizer()
CANARY = list(range(40, 72))
KEY_VARIABLE = "MEGARL_TEST_ENGINE_KEY"  # set by conftest.py: every server here has a key
BF16 = 0.1  # bound on log-probs between two bf16 forward passes


@dataclass
class Policy:
    """A model on disk and the same in memory."""

    folder: Path
    model: Qwen3ForCausalLM

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """As a learner sends them: Hugging Face names, the tied output layer left out."""
        return [(name, tensor.detach()) for name, tensor in self.model.named_parameters()]

    def canary(self) -> Canary:
        return Canary(CANARY, reference_logprobs(self.model, CANARY))


@dataclass
class Live:
    """A started pool and the event loop that it lives in."""

    pool: Pool
    runner: asyncio.Runner


def settings(policy: Policy, run: Path, engine: str, **servers: object) -> Settings:
    """A run on real servers. A missing environment is an error, never a skip."""
    started = {"start_timeout": 600, "device": "cpu", "api_key_env": KEY_VARIABLE}
    return parse(
        {
            "run": str(run),
            "model": {"path": str(policy.folder)},
            "data": {"train": []},
            "rollout": {"engine": engine, "servers": {**started, **servers}},
        }
    )
