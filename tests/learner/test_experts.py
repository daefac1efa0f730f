"""Mixtures of experts in the learner against transformers' Qwen3-MoE, in float32 on the CPU."""

import pytest

from megarl.bench.parity import EXPERT_LAYOUTS, Case, compare


@pytest.mark.slow
@pytest.mark.parallel
def test_loss_and_every_gradient_match_transformers_under_expert_parallelism():
    """Routers, experts and the rest, by name: with ep 2 under tp2 (uneven tokens per rank) and pp2.

    With ep 1 too, where experts are split unlike the dense layers, under tp2, pp2 and cp2.

    Says nothing about grouped matrix products or dispatchers of a GPU, nor about dropped tokens: none are.
    """
    rows = compare([Case(layout, *placed, family="qwen3_moe") for layout, placed in EXPERT_LAYOUTS.items()])
    assert [row["layout"] for row in rows] == list(EXPERT_LAYOUTS)
    for row in rows:
        assert row["dloss"] < 2e-6 and row["relgrad"] < 2e-5, row
        assert row["gradient"] > 1e-3, row  # there is something to compare
