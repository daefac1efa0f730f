"""Each precision teaches and trains the quick start's reasoner as bf16 does (README.md).

First comes supervised fine-tuning from random weights, on the quick start's lesson: the loss at half and at the end of
the lesson, each over a tenth of the updates. Then comes reinforcement learning from the shipped reasoner: accuracy on
the held-out problems at temperature 1, where learning shows most. On a CPU, FP8 is emulated and the engine computes in
bf16 (under fp32 in float32).

`bf16_again` measures how far two trainings with the same arithmetic differ: it starts from other random weights and
samples with other seeds. A precision that differs from bf16 by no more than that is not distinguishable from it. In the
lesson's second half chance is large: the loss drops by a tenth within some forty updates, early in one run and at the
end in another. Losses are averaged over seeds, each against bf16's of the same seed. Accuracies are compared by their
standard error over problems; the same chance comes on top.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from megarl.bench.common import result, training_runs
from megarl.bench.common.choice import chosen
from megarl.view import table

REFERENCE, AGAIN = "bf16", "bf16_again"
PRECISIONS = {
    REFERENCE: "{dtype: bf16}",
    AGAIN: "{dtype: bf16}",
    "fp32": "{dtype: fp32}",
    **{recipe: f"{{dtype: fp8, recipe: {recipe}}}" for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")},
}
OTHER_SEEDS = 1000  # the first seed of AGAIN; its lesson is the reference's
LESSON = Path("examples/quickstart/sft.yaml")
LESSON_RANKS = 2  # data parallel
LESSON_TIMEOUT = 300.0  # seconds to write the demonstrations
WARM = ["evaluation.temperature=1.0", "evaluation.every=0", "checkpoint.every=0"]
Row = dict[str, Any]


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    precisions: Annotated[str, typer.Option(help="Comma-separated; bf16 is always among them.")] = ",".join(PRECISIONS),
    sft_steps: Annotated[int, typer.Option(min=1, help="Updates of supervised fine-tuning.")] = 400,
    rl_steps: Annotated[int, typer.Option(min=0, help="Steps of reinforcement learning; 0 leaves it out.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of supervised fine-tuning: 0, 1, …")] = 2,
    rl_seeds: Annotated[int, typer.Option(min=0, help="Seeds of reinforcement learning: the first of them.")] = 1,
    overrides: Annotated[str, typer.Option(help="Settings of every run, separated by spaces.")] = "",
    runs: Annotated[Path, typer.Option(help="Where the runs go; finished ones are not repeated.")] = Path(
        "runs/bench/precision"
    ),
) -> None:
    """Teach and train in every precision; print losses over bf16's, and differences of accuracy with their errors."""
    wanted = chosen(precisions, PRECISIONS, "precisions")
    wanted = [REFERENCE, *(name for name in wanted if name != REFERENCE)]
    rows: list[Row] = []
    for seed in range(seeds):
        for name in wanted:
            row: Row = {"precision": name, "seed": seed, **teach(name, seed, sft_steps, runs, overrides.split())}
            if rl_steps and seed < rl_seeds:
                row |= train(name, seed, rl_steps, runs, overrides.split())
            rows.append(row)
            table.show_rows("so far", rows)
    result.publish("precision", rows, json, summary=summary(rows))
    table.show_rows(f"against {REFERENCE}", summary(rows))


def teach(precision: str, seed: int, steps: int, runs: Path, overrides: Sequence[str]) -> Row:
    """Fine-tune for `steps` updates: losses halfway and at the end, in nats per response token."""
    lesson = runs / f"lesson-{steps}-{seed}" / "lesson.jsonl"
    settings = training_runs.settings(
        LESSON,
        runs / f"sft-{precision}-{steps}-{seed}",
        _seed(precision, seed),
        [f"data.train=[{lesson}]", f"steps={steps}", f"precision={PRECISIONS[precision]}",
         f"optimizer.warmup_steps={min(50, steps // 4)}", *overrides, "data.eval=[]"],
    )  # fmt: skip
    _lesson(lesson.parent, steps * settings.batch.prompts_per_step, seed)
    metrics = training_runs.taught(settings, LESSON_RANKS)

    def before(end: int) -> float:
        return mean(line["nll"] for line in metrics[end - max(1, steps // 10) : end])

    return {
        "sft_loss_half": before(max(1, steps // 2)),
        "sft_loss": before(steps),
        "sft_seconds": sum(line["seconds_train"] for line in metrics),
    }


def train(precision: str, seed: int, steps: int, runs: Path, overrides: Sequence[str]) -> Row:
    """Reinforcement learning from the shipped reasoner: held-out accuracy before and after, with standard errors."""
    settings = training_runs.settings(
        training_runs.QUICKSTART,
        runs / f"rl-{precision}-{steps}-{seed}",
        _seed(precision, seed),
        [*WARM, f"steps={steps}", f"precision={PRECISIONS[precision]}", *overrides],
    )
    metrics = training_runs.trained(settings)
    before, after = metrics[0], metrics[-1]
    lines = [line for line in metrics if line["step"] > 0]
    return {
        "accuracy_before": before["eval/accuracy"],
        "accuracy": after["eval/accuracy"],
        "accuracy_se": _standard_error(after["eval/accuracy"], after["eval/completions"]),
        "completions": after["eval/completions"],
        "mismatch_mean": mean(line["mismatch_mean"] for line in lines),
        "canary_max": max(line["canary_difference"] for line in lines),
        "rl_seconds": sum(line["seconds_total"] for line in lines),
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per precision, over seeds: losses over bf16's of the same seed (mean and extremes), and accuracy minus bf16's.

    Accuracies are those of the seeds that were trained by reinforcement learning, with the difference's standard error.
    """
    groups = {name: [row for row in rows if row["precision"] == name] for name in PRECISIONS}
    bases = {row["seed"]: row for row in groups[REFERENCE]}
    result = []
    for name, group in groups.items():
        if not group:
            continue
        line: Row = {"precision": name, "seeds": len(group)}
        for loss in ("sft_loss_half", "sft_loss"):
            over = [row[loss] / bases[row["seed"]][loss] - 1 for row in group]
            line |= {
                loss: mean(row[loss] for row in group),
                f"{loss}_over_bf16": mean(over),
                f"{loss}_over_bf16_least": min(over),
                f"{loss}_over_bf16_most": max(over),
            }
        if pairs := [(row, bases[row["seed"]]) for row in group if "accuracy" in row]:
            error = sqrt(sum(row["accuracy_se"] ** 2 + base["accuracy_se"] ** 2 for row, base in pairs)) / len(pairs)
            line |= {
                "accuracy_before": mean(row["accuracy_before"] for row, _ in pairs),
                "accuracy": mean(row["accuracy"] for row, _ in pairs),
                "over_bf16": mean(row["accuracy"] - base["accuracy"] for row, base in pairs),
                "over_bf16_se": error,
            }
        result.append(line)
    return result


def _seed(precision: str, seed: int) -> int:
    return seed + OTHER_SEEDS if precision == AGAIN else seed


def _lesson(folder: Path, count: int, seed: int) -> None:
    """Write `count` demonstrations with the quick start's command, which finds `examples` in the working directory."""
    command = [sys.executable, "-m", "examples.quickstart.make_problems", str(folder)]
    subprocess.run([*command, "--lesson", str(count), "--seed", str(seed)], check=True, timeout=LESSON_TIMEOUT)


def _standard_error(share: float, count: int) -> float:
    return sqrt(share * (1 - share) / count)
