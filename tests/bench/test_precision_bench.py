"""`megarl bench precision`: what it runs and how it compares. What the precisions reach is the benchmark's affair."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import pytest

from megarl.bench import precision
from megarl.errors import UserError


@pytest.mark.parallel
@pytest.mark.timeout(600)
def test_two_precisions_are_taught_and_trained_and_not_again(tmp_path: Path) -> None:
    """4 updates and 1 step, 8 problems: bf16 comes first, its loss over its own is 0, and FP8 differs from it. A second
    call takes what is there."""
    problems = Path("examples/quickstart/problems/heldout.jsonl").read_text().splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(problems[:8]) + "\n")
    small = f"batch.prompts_per_step=4 data.eval=[{tmp_path / 'few.jsonl'}] rollout.max_response_tokens=64"
    asked = {"precisions": "mxfp8", "sft_steps": 4, "rl_steps": 1, "overrides": small, "runs": tmp_path / "runs"}
    precision.main(tmp_path / "once.json", **asked)
    precision.main(tmp_path / "again.json", **asked)
    once, again = (json.loads((tmp_path / name).read_text()) for name in ("once.json", "again.json"))
    assert once["rows"] == again["rows"]  # seconds included
    bf16, mxfp8 = once["rows"]
    assert (bf16["precision"], mxfp8["precision"]) == ("bf16", "mxfp8")
    assert bf16["sft_loss"] != mxfp8["sft_loss"] == pytest.approx(bf16["sft_loss"], rel=0.02)
    assert all(row["completions"] == 8 and 0 <= row["accuracy"] <= 1 for row in once["rows"])
    assert [line["sft_over_bf16"] == 0 for line in once["summary"]] == [True, False]


def test_seeds_are_compared_in_pairs() -> None:
    """Losses by ratio within a seed; accuracies with the standard error of a mean difference over the seeds."""
    same = {"accuracy_before": 0.5, "accuracy_se": 0.02}
    rows = [
        {"precision": name, "seed": seed, "sft_loss": loss, "accuracy": acc, **same}
        for name, seed, loss, acc in [
            ("bf16", 0, 1.0, 0.70), ("delayed", 0, 1.1, 0.72), ("bf16", 1, 2.0, 0.60), ("delayed", 1, 2.0, 0.64),
        ]
    ]  # fmt: skip
    bf16, delayed = precision.summary(rows)
    assert (bf16["sft_over_bf16"], bf16["over_bf16"]) == (0, 0)
    assert delayed["sft_over_bf16"] == pytest.approx(0.05)
    assert delayed["over_bf16"] == pytest.approx(0.03)
    assert delayed["over_bf16_se"] == pytest.approx(sqrt(4 * 0.02**2) / 2)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'mxfp9' is not a precision"):
        precision.main(precisions="mxfp9", runs=tmp_path)
