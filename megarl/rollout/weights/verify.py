"""Weights from the learner into an engine, and the proof that they arrived: checksums and a canary.

Transport is the engine's own (`Engine.update_weights`); what is sent and what must hold afterwards is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megarl.errors import RunError
from megarl.rollout.engine import Engine
from megarl.rollout.in_engine.megarl_weights import checksum

__all__ = ["LIKELY", "Canary", "check", "checksum", "send"]

LIKELY = 1.0
"""Nats. Rounding of a logit grows with its size, so an unlikely token's log-prob is less exact than a likely one's:
beyond this the canary's bound grows in proportion to |log-prob|."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A fixed sequence, and the learner's log-probs of its last `len(logprobs)` tokens at temperature 1."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


async def send(
    engine: Engine, version: int, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype | None = None
) -> None:
    """Stream Hugging Face-named `tensors`, cast to the engine's `dtype`, into `engine` as weight `version`.

    Raises RunError naming the first tensor whose checksum at the engine differs from what was sent. `tensors` is always
    drained: the learner's ranks gather them together, and none may be left waiting for the others.
    """
    sent: dict[str, int] = {}

    def outgoing() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source:
            tensor = tensor.to(dtype) if dtype else tensor
            sent[name] = checksum(tensor)
            yield name, tensor

    source = iter(tensors)
    try:
        arrived = await engine.update_weights(version, outgoing())
    finally:
        for _ in source:
            pass
    for name, expected in sent.items():
        if name in arrived and arrived[name] != expected:
            raise RunError(f"weight sync {version}: {name} is not at the engine as it was sent (checksums differ)")


async def check(engine: Engine, version: int, canary: Canary, bound: float) -> float:
    """Hold the engine's log-probs of `canary` against the learner's; returns the largest difference.

    Raises RunError where one differs by more than its bound: `bound` for tokens above -LIKELY nats, and
    `bound` * |log-prob| / LIKELY below.
    """
    first = len(canary.token_ids) - len(canary.logprobs)
    scored = await engine.score(canary.token_ids)
    if len(scored) != len(canary.token_ids) - 1:
        raise RunError(
            f"weight sync {version}: the engine scored {len(scored)} of {len(canary.token_ids) - 1} canary tokens"
        )
    scored = scored[first - 1 :]
    differences = [abs(a - b) for a, b in zip(scored, canary.logprobs, strict=True)]
    bounds = [bound * max(1.0, abs(logprob) / LIKELY) for logprob in canary.logprobs]
    for i, (difference, allowed) in enumerate(zip(differences, bounds, strict=True)):
        # nan is within no bound, and an infinite log-prob, whose bound is infinite, is never right.
        if not difference <= allowed < math.inf:
            raise RunError(
                f"weight sync {version}: the tensors arrived, but the canary's log-probs differ from the "
                f"learner's by {difference:.3g} at token {first + i}, of log-prob {canary.logprobs[i]:.3g} (its bound "
                f"{allowed:.3g}): the two forward passes disagree"
            )
    return max(differences)
