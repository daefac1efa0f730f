"""Weights are pushed again when every engine died amid the push and came back without them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megarl.errors import RunError
from megarl.loop import rollout_engine
from megarl.loop.rollout_engine import RolloutEngine
from megarl.rollout.weights.transport import NotDelivered
from megarl.rollout.weights.verify import Canary
from megarl.runtime.event_loop import EventLoop

TOKENS = [1, 2, 3, 4]


class Dying:
    """An engine that loses the weights at the given calls, each named once for every time it does."""

    def __init__(self, *dies_at: str) -> None:
        self.dies_at = list(dies_at)
        self.received: list[tuple[int, list[str]]] = []

    def _may_die(self, call: str) -> None:
        if call in self.dies_at:
            self.dies_at.remove(call)
            raise NotDelivered("the only engine was restarted")

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
        self.received.append((version, [name for name, _ in tensors]))
        self._may_die("update")
        return {}

    async def checksums(self) -> dict[str, int]:
        return {}

    async def score(self, token_ids: list[int]) -> list[float]:
        self._may_die("score")
        return [-1.0] * (len(token_ids) - 1)


def pusher(engine: Dying, loop: EventLoop) -> RolloutEngine:
    """A `RolloutEngine` of one rank, with stand-ins for learner and prompts."""

    class Pusher(RolloutEngine):
        def __init__(self) -> None:
            self.settings = SimpleNamespace(rollout=SimpleNamespace(embedded=False, canary_limit=0.1), run=Path("."))
            self.world = SimpleNamespace(world_size=1, deadline_s=60.0, dp_size=1)
            self.loop, self.engine, self._sent = loop, engine, {}
            self.learner = SimpleNamespace(
                named_tensors=lambda: iter([("a", torch.ones(2)), ("b", torch.ones(3))]),
            )
            loader = SimpleNamespace(prompts=[SimpleNamespace(token_ids=TOKENS[:2])])
            self.controller = SimpleNamespace(loader=loader, answer=TOKENS[2:])

    return Pusher()


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's log-probs are those that `Dying` has."""
    monkeypatch.setattr(rollout_engine.canaries, "measure", lambda *_: Canary(TOKENS, [-1.0, -1.0], [0.1, 0.1]))


@pytest.mark.parametrize("dies_at", [(), ("update",), ("score",), ("update", "score", "update")])
def test_a_push_is_repeated_until_an_engine_has_the_weights(dies_at: tuple[str, ...]) -> None:
    """Every tensor is sent each time, since the engine came back without any."""
    with EventLoop(torch.device("cpu")) as loop:
        engine = Dying(*dies_at)
        pusher(engine, loop).push(7)
    assert engine.received == [(7, ["a", "b"])] * (len(dies_at) + 1)


def test_any_other_failure_of_a_push_is_an_error() -> None:
    class Failing(Dying):
        async def score(self, token_ids: list[int]) -> list[float]:
            raise RunError("no engine is left")

    with EventLoop(torch.device("cpu")) as loop, pytest.raises(RunError, match="no engine is left"):
        pusher(Failing(), loop).push(7)
