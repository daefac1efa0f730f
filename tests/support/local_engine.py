"""What the tests of the embedded engine share."""

import asyncio

import torch

from megarl.rollout.local.engine import LocalEngine


def prompt(seed: int, length: int) -> list[int]:
    """Random ids of a vocabulary of 64, special ones left out."""
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(logprobs, expected) -> None:
    """Assert that log-probs are the expected ones, to 1e-4."""
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)


def steps(engine: LocalEngine, count: int) -> asyncio.Event:
    """An event that is set when the engine begins its `count`-th step from now."""
    event, step, left = asyncio.Event(), engine.step, [count]

    def counted() -> bool:
        left[0] -= 1
        if left[0] == 0:
            event.set()
        return step()

    engine.step = counted
    return event
