"""Sends the learner's weights to an engine and checks that they arrived, by checksums and a canary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megarl.errors import RunError
from megarl.rollout.engine import Engine
from megarl.rollout.in_engine.megarl_weights import checksum

__all__ = ["LIKELY", "Canary", "Checksums", "check", "checksum", "send"]

LIKELY = 1.0
"""Nats. The rounding error of a logit grows with its size, so an unlikely token's log-prob is less exact than a likely
one's. Beyond this, a limit in nats grows in proportion to |log-prob|."""
MEAN_LIMIT, TOKEN_LIMIT = 3.0, 15.0
"""Without a limit in nats: the largest root mean square of |difference| / `Canary.scale`, and the largest of one token.
Two right programs reach 1.5 and 6 (`megarl bench canary`)."""
LEAST = 1e-3
"""Nats. Two right programs differ by this much in float32: they tabulate rotations and add in another order."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A fixed sequence and the learner's log-probs of its last n tokens at temperature 1.

    `rounding`: how far each of these moves when the learner's input moves by one rounding error, root mean square over
    several such moves, in nats [n]. Empty: not measured.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    rounding: Sequence[float] = ()

    def scale(self) -> np.ndarray:
        """The difference that rounding explains at each token, in nats [n].

        Few moves measure one token badly. So it is half the token's own rounding and half what tokens of its
        probability p have: logits round alike, and a log-prob moves by 1 - p times as much as its logit.
        """
        own = np.array(self.rounding or np.zeros(len(self.logprobs)))
        slope = 1 - np.exp(np.array(self.logprobs))
        typical = slope * math.sqrt(np.sum(own**2) / max(np.sum(slope**2), 1e-12))
        least = max(LEAST, math.sqrt(np.mean(own**2)) / 4)
        return np.asarray(np.sqrt((own**2 + typical**2) / 2 + least**2))


class Checksums:
    """Checksums of the sent tensors, for servers that report the checksum of each by its Hugging Face name."""

    def __init__(self, *, complete: bool) -> None:
        """`complete`: the server reports every tensor, so that one without a checksum did not arrive."""
        self._complete = complete
        self._sent: dict[str, int] = {}

    def add(self, name: str, tensor: torch.Tensor, total: int | None = None) -> None:
        self._sent[name] = checksum(tensor) if total is None else total

    def differing(self, reported: Mapping[str, int]) -> list[str]:
        """The names of the tensors that did not arrive as they were sent."""
        expected = self._sent if self._complete else self._sent.keys() & reported.keys()
        return [name for name in expected if reported.get(name) != self._sent[name]]


async def send(engine: Engine, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Stream Hugging Face-named `tensors` into `engine` as weight `version`. Returns the checksums of what was sent.

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
    _compare(version, sent, arrived)
    return sent


async def check(
    engine: Engine, version: int, canary: Canary, limit: float | None = None, sent: Mapping[str, int] | None = None
) -> float:
    """Compare the engine's weights with the checksums `sent`, and its log-probs of `canary` with the learner's.

    Returns the largest difference of a log-prob, in nats. Raises RunError naming a tensor that the engine has
    otherwise, or saying that the log-probs differ by more than rounding explains: see `MEAN_LIMIT`. A `limit` in nats
    replaces that rule: no token may differ by more, and one below -LIKELY nats by more than limit * |log-prob|.
    """
    held = await engine.checksums() if sent else {}
    _compare(version, sent or {}, held)
    scored = await engine.score(canary.token_ids)
    if len(scored) != len(canary.token_ids) - 1:
        raise RunError(
            f"weight sync {version}: the engine scored {len(scored)} of {len(canary.token_ids) - 1} canary tokens"
        )
    logprobs = np.array(canary.logprobs)
    with np.errstate(invalid="ignore"):  # of two infinite log-probs
        differences = np.abs(np.array(scored[len(scored) - len(logprobs) :]) - logprobs)
    complaint = _beyond_rounding(canary, differences) if limit is None else _beyond(canary, differences, limit)
    if complaint:
        whole = (
            "the engine has every tensor as it was sent" if held else "the tensors arrived as far as the engine reports"
        )
        raise RunError(
            f"weight sync {version}: {whole}, but the canary's log-probs differ from the learner's by {complaint}: "
            "the two forward passes disagree"
        )
    return float(differences.max())


def _compare(version: int, sent: Mapping[str, int], held: Mapping[str, int]) -> None:
    """Raises RunError naming the first tensor whose checksum at the engine is not the one that was sent."""
    for name, expected in sent.items():
        if name in held and held[name] != expected:
            raise RunError(f"weight sync {version}: {name} is not at the engine as it was sent (checksums differ)")


def _beyond(canary: Canary, differences: np.ndarray, limit: float) -> str | None:
    """The first difference above a limit in nats; None if there is none."""
    allowed = limit * np.maximum(1.0, np.abs(canary.logprobs) / LIKELY)
    # nan is never within a limit. An infinite log-prob has an infinite limit and is always wrong.
    for i in np.flatnonzero(~((differences <= allowed) & np.isfinite(allowed))).tolist():
        token = len(canary.token_ids) - len(differences) + i
        at = f"at token {token}, whose log-prob is {canary.logprobs[i]:.3g}"
        return f"{differences[i]:.3g} nats {at} (rollout.canary_limit allows {allowed[i]:.3g})"
    return None


def _beyond_rounding(canary: Canary, differences: np.ndarray) -> str | None:
    """What rounding does not explain of the differences; None if it explains them all."""
    with np.errstate(invalid="ignore"):  # of an infinite rounding
        scale = canary.scale()
    ratios = differences / scale
    mean, worst = math.sqrt(np.mean(ratios**2)), int(np.argmax(ratios))  # of nan the first
    if np.isfinite(scale).all() and mean <= MEAN_LIMIT and ratios[worst] <= TOKEN_LIMIT:
        return None
    token = len(canary.token_ids) - len(differences) + worst
    at = f"{differences[worst]:.3g} nats at token {token}, {ratios[worst]:.3g} times, limit {TOKEN_LIMIT:g}"
    return f"{mean:.3g} times what rounding explains (limit {MEAN_LIMIT:g}; {at})"
