"""The learner against transformers and against itself: loss and gradients do not depend on how they are computed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.bench import invariance, parity
from megarl.bench.parity import LAYOUTS, Case

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def compared() -> dict[str, list[dict[str, Any]]]:
    """By layout, the comparison with transformers: tied and packed, and untied and not packed."""
    kinds = [{"tied": True, "packed": True}, {"tied": False, "packed": False}]
    rows = parity.compare([Case(name, *placed, **kind) for name, placed in LAYOUTS.items() for kind in kinds])
    return {name: [row for row in rows if row["layout"] == name] for name in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_are_transformers(compared: dict[str, list[dict[str, Any]]], layout: str) -> None:
    """In float32, on a random Qwen3 of four layers; `megarl bench parity` has all combinations and other families.

    Says nothing about CUDA, where other kernels compute.
    """
    assert len(compared[layout]) == 2
    for row in compared[layout]:
        assert row["gradient"] > 1e-2, row  # there is something to compare
        assert row["dloss"] <= 1e-5, row
        assert row["dgrad"] <= 1e-6, row
        assert row["dnorm"] <= 1e-5, row


@settings(max_examples=2)
@given(st.lists(st.integers(0, 10**6), min_size=6, max_size=6, unique=True))
def test_gradients_do_not_depend_on_layout_rows_or_order(numbers: list[int]) -> None:
    """Six draws of layout, row capacity, micro-batches and order an example; `megarl bench invariance` has more."""
    for row in invariance.measure([invariance.draw(number) for number in numbers]):
        assert row["rel_grad"] <= 1e-5, row
