"""`megarl bench precision`: what it runs and how it compares. What the precisions reach is the benchmark's affair."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest

from examples.precision import bench as precision
from megarl.errors import UserError

pytestmark = pytest.mark.slow


@pytest.mark.parallel
@pytest.mark.timeout(600)
def test_two_precisions_are_taught_and_trained_and_not_again(tmp_path: Path, bench: Callable[..., None]) -> None:
    """4 updates and 1 step, 8 problems: bf16 comes first, its loss over its own is 0, and FP8 differs from it by
    little, bf16 from other weights by more. A second call takes what is there."""
    problems = Path("examples/quickstart/problems/heldout.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(problems[:8]) + "\n")
    small = f"batch.prompts_per_step=4 data.eval=[{tmp_path / 'few.jsonl'}] rollout.max_response_tokens=64"
    asked = ["--precisions", "bf16_again,mxfp8", "--sft-steps", 4, "--rl-steps", 1, "--seeds", 1]
    asked += ["--overrides", small, "--runs", tmp_path / "runs"]
    bench("precision", "--json", tmp_path / "once.json", *asked)
    bench("precision", "--json", tmp_path / "again.json", *asked)
    once, again = (json.loads((tmp_path / name).read_text()) for name in ("once.json", "again.json"))
    assert once["rows"] == again["rows"]  # seconds included
    bf16, again_bf16, mxfp8 = once["rows"]
    assert [row["precision"] for row in once["rows"]] == ["bf16", "bf16_again", "mxfp8"]
    off, chance = (abs(row["sft_loss"] - bf16["sft_loss"]) for row in (mxfp8, again_bf16))
    assert 0 < off < chance
    assert mxfp8["sft_loss"] == pytest.approx(bf16["sft_loss"], rel=0.02)
    assert all(row["completions"] == 8 and 0 <= row["accuracy"] <= 1 for row in once["rows"])
    assert [line["sft_loss_over_bf16"] == 0 for line in once["summary"]] == [True, False, False]


def test_seeds_are_compared_in_pairs() -> None:
    """Losses by ratio within a seed; accuracies with the standard error of a mean difference over the seeds."""
    same = {"accuracy_before": 0.5, "accuracy_se": 0.02}
    rows = [
        {"precision": name, "seed": seed, "sft_loss_half": 2 - loss / 2, "sft_loss": loss, "accuracy": acc, **same}
        for name, seed, loss, acc in [
            ("bf16", 0, 1.0, 0.70), ("delayed", 0, 1.1, 0.72), ("bf16", 1, 2.0, 0.60), ("delayed", 1, 2.0, 0.64),
        ]
    ]  # fmt: skip
    bf16, delayed = precision.summary(rows)
    assert (bf16["sft_loss_over_bf16"], bf16["over_bf16"]) == (0, 0)
    assert delayed["sft_loss_over_bf16"] == pytest.approx(0.05)
    assert delayed["sft_loss_half_over_bf16"] == pytest.approx(-1 / 60)
    assert (delayed["sft_loss_over_bf16_least"], delayed["sft_loss_over_bf16_most"]) == (0, pytest.approx(0.1))
    assert delayed["over_bf16"] == pytest.approx(0.03)
    assert delayed["over_bf16_se"] == pytest.approx(sqrt(4 * 0.02**2) / 2)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--precisions: 'mxfp9' is not one of"):
        precision.main(precisions="mxfp9", runs=tmp_path)


def test_accuracies_are_those_of_the_seeds_that_were_trained() -> None:
    """The second seed was taught only: it counts for the loss, and not for the accuracy."""
    trained = {"accuracy_before": 0.5, "accuracy": 0.7, "accuracy_se": 0.02}
    rows = [
        {"precision": name, "seed": seed, "sft_loss_half": 1.0, "sft_loss": loss, **more}
        for name, seed, loss, more in [
            ("bf16", 0, 1.0, trained), ("mxfp8", 0, 1.2, {**trained, "accuracy": 0.8}),
            ("bf16", 1, 1.0, {}), ("mxfp8", 1, 1.0, {}),
        ]
    ]  # fmt: skip
    _, mxfp8 = precision.summary(rows)
    assert (mxfp8["seeds"], mxfp8["sft_loss_over_bf16"]) == (2, pytest.approx(0.1))
    assert mxfp8["over_bf16"] == pytest.approx(0.1)
    assert mxfp8["over_bf16_se"] == pytest.approx(sqrt(2) * 0.02)
