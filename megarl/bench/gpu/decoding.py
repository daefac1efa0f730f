"""The embedded engine with a model of Qwen3-0.6B's sizes: tokens/s, the time of a step, and memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.bench.common.models import write_config
from megarl.bench.gpu.part import Scale
from megarl.bench.gpu.timing import milliseconds, where
from megarl.bench.rollout import NoTokenizer, Work, by_contract
from megarl.planner.hardware import GIB
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.local.engine import LocalEngine
from megarl.runtime import device

PROMPT = 64  # tokens


def embedded(scale: Scale, folder: Path) -> dict[str, Any]:
    """`scale.slots` sequences at a time, each of `scale.new_tokens` after a prompt of 64."""
    model = write_config(folder, tied=True, **scale.engine)
    here, dtype = where(), torch.bfloat16 if device.on_cuda() else torch.float32
    longest = PROMPT + scale.new_tokens
    vocabulary = Vocabulary(NoTokenizer())  # type: ignore[arg-type]
    engine = LocalEngine(folder, vocabulary, here, dtype, batch_slots=scale.slots, max_length=longest)
    weights = ((name, _weight(parameter.shape, here, dtype)) for name, parameter in model.named_parameters())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 500, PROMPT).tolist() for _ in range(scale.slots)]
    with asyncio.Runner() as runner:
        runner.run(engine.update_weights(0, weights))
        work = Work(prompts, [scale.new_tokens] * scale.slots, 500)
        run = by_contract(runner, engine)
        taken = milliseconds(lambda: run(work), 1)
    return {
        "tokens_per_s": scale.slots * scale.new_tokens / taken * 1e3,
        "step_ms": taken / scale.new_tokens,
        "peak_gib": device.peak_memory() / GIB,
    }


def _weight(shape: torch.Size, here: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Ones for a norm, else small random numbers."""
    if len(shape) == 1:
        return torch.ones(shape, device=here, dtype=dtype)
    return torch.randn(shape, device=here, dtype=dtype).mul_(0.02)
