"""Sends the learner's weights to an engine and checks that they arrived, by checksums and a canary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megarl.errors import RunError
from megarl.rollout.engine import Engine
from megarl.rollout.in_engine.megarl_weights import checksum

__all__ = ["LIKELY", "Canary", "Checksums", "check", "checksum", "send"]

LIKELY = 1.0
"""Nats. The rounding error of a logit grows with its size, so an unlikely token's log-prob is less exact than a likely
one's. Beyond this, the canary's bound grows in proportion to |log-prob|."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A fixed sequence, and the learner's log-probs of its last `len(logprobs)` tokens at temperature 1."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


class Checksums:
    """Checksums of the sent tensors, for servers that report the checksum of each by its Hugging Face name."""

    def __init__(self, *, complete: bool) -> None:
        """`complete`: the server reports every tensor, so that one without a checksum did not arrive."""
        self._complete = complete
        self._sent: dict[str, int] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._sent[name] = checksum(tensor)

    def differing(self, reported: Mapping[str, int]) -> list[str]:
        """The names of the tensors that did not arrive as they were sent."""
        expected = self._sent if self._complete else self._sent.keys() & reported.keys()
        return [name for name in expected if reported.get(name) != self._sent[name]]


async def send(engine: Engine, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Stream Hugging Face-named `tensors` into `engine` as weight `version`.

    Raises RunError naming the first tensor whose checksum at the engine differs from what was sent. Always reads
    `tensors` to the end: the learner's ranks gather them together, and no rank may be left waiting for the others.
    """
    sent: dict[str, int] = {}

    def outgoing() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source:
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
    """Compare the engine's log-probs of `canary` with the learner's. Returns the largest difference, in nats.

    Raises RunError if one differs by more than its bound: `bound` for tokens above -LIKELY nats, and
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
        # nan is never within a bound. An infinite log-prob has an infinite bound and is always wrong.
        if not difference <= allowed < math.inf:
            raise RunError(
                f"weight sync {version}: the tensors arrived, but the canary's log-probs differ from the learner's by "
                f"{difference:.3g} at token {first + i}, whose log-prob is {canary.logprobs[i]:.3g} (bound: "
                f"{allowed:.3g}): the two forward passes disagree"
            )
    return max(differences)
