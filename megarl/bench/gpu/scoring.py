"""Log-probs from hidden states: time and memory by the size of a chunk, and what rounding the logits to bf16 costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.bench.common.learners import TIMEOUT, settings
from megarl.bench.gpu.part import Scale
from megarl.bench.gpu.timing import milliseconds, where
from megarl.learner import logprobs
from megarl.learner.parallel import start
from megarl.planner.hardware import GIB
from megarl.runtime import device

CHUNKS = (64, 256, 1024, 4096)  # MiB of float32 logits


def chunks(scale: Scale, folder: Path, hidden: int) -> dict[str, Any]:
    """Forward and backward in bf16 of `scale.scored` tokens. Peaks are those beside inputs and weight.

    `*_dnorm`: relative difference of the weight gradient's norm from the first size's.
    """
    chosen = settings(folder)
    start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
    width = 64 if scale.rehearsal else hidden
    inputs = (torch.randn(scale.scored, width, device=where()) * 0.5).bfloat16().requires_grad_()
    weight = (torch.randn(scale.vocabulary, width, device=where()) * 0.02).bfloat16().requires_grad_()
    labels = torch.randint(0, scale.vocabulary, (scale.scored,), device=where())

    def once() -> None:
        inputs.grad = weight.grad = None
        group = dist.group.WORLD
        assert group is not None
        found = logprobs.logprobs_and_entropy(inputs, weight, labels, 1.0, scale.vocabulary, group)
        (found[0].sum() + 0.01 * found[1].sum()).backward()

    metrics: dict[str, Any] = {}
    first = 0.0
    for mib in CHUNKS:
        logprobs.CHUNK_BYTES[where().type] = mib << 20
        inputs.grad = weight.grad = None
        before = _reset_peak()
        metrics[f"{mib}_mib_ms"] = milliseconds(once, scale.repeats)
        metrics[f"{mib}_mib_peak_gib"] = (device.peak_memory() - before) / GIB
        assert weight.grad is not None
        norm = float(weight.grad.float().norm())
        first = first or norm
        metrics[f"{mib}_mib_dnorm"] = abs(norm / first - 1)
    return metrics | (_rounding(inputs.detach(), weight.detach()) if device.on_cuda() else {})


def _reset_peak() -> int:
    """Bytes in use now, from which the peak counts again. On a CPU, the peak so far."""
    if not device.on_cuda():
        return device.peak_memory()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _rounding(inputs: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """Largest error of a label's log-prob from bf16 logits, and from the same product kept in float32."""
    part = inputs[:1024]
    exact = (part.float() @ weight.float().t()).log_softmax(-1)
    rounded = (part @ weight.t()).float().log_softmax(-1)
    kept = torch.mm(part, weight.t(), out_dtype=torch.float32).log_softmax(-1)
    return {
        "bf16_logits_error": float((rounded - exact).abs().max()),
        "fp32_logits_error": float((kept - exact).abs().max()),
    }
