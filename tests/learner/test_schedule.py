"""The learning rate is the documented function of the update."""

import math

import pytest

from megarl.config import Optimizer
from megarl.learner.schedule import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    chosen = Optimizer(lr=1.0, **settings)
    return [learning_rate(update, total, chosen) for update in range(total + 2)]


def test_constant_after_warmup() -> None:
    """The warm-up ends at lr with its last update, and never uses a rate of 0."""
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_decay_reaches_the_minimum_at_the_end() -> None:
    """From lr after the warm-up to min_lr at update `total`, and no further."""
    assert rates(6, warmup_steps=2, decay="linear", min_lr=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    )


def test_cosine_decay_is_half_way_in_the_middle() -> None:
    """Half a cosine, against the formula written out."""
    found = rates(8, decay="cosine", min_lr=0.1)
    assert found[4] == pytest.approx(0.55)
    assert found == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * min(u, 8) / 8)) for u in range(10)])


def test_a_run_of_warmup_alone() -> None:
    """A total not above the warm-up divides by nothing."""
    assert rates(3, warmup_steps=3, decay="cosine")[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
