"""Seconds to GRPO's accuracy with dynamic pruning and packing, part by part (arXiv 2603.04135): examples/dppo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

from megarl.bench import _study, record
from megarl.errors import UserError, nearest

# What peers run: dense rows by token budget (as dense as dynamic batching gets), every group trained.
PEERS = ["packing.strategy=first_fit", "pruning.drop_zero_variance=false"]
PACKED = ["packing.strategy=dense", "packing.window=256"]
METHODS = {
    "grpo": [*PEERS],
    "packing": [*PACKED, "pruning.drop_zero_variance=false"],
    "grpo_strong": [*PACKED, "pruning.drop_zero_variance=true"],  # the strongest fair baseline
    "prompts": [*PACKED, "pruning.drop_zero_variance=true", "pruning.prompts={rate}"],
    "completions": [*PACKED, "pruning.drop_zero_variance=true", "pruning.completions={rate}"],
    "dppo": [*PACKED, "pruning.drop_zero_variance=true", "pruning.prompts={rate}", "pruning.completions={rate}"],
}
UNPRUNED = ["pruning.prompts=0", "pruning.completions=0"]
EXAMPLE = Path("examples/dppo/train.yaml")


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method: 0, 1, …")] = 3,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    rates: Annotated[str, typer.Option(help="Pruning rates to try, comma-separated.")] = "0.5",
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations: how finely the time is resolved.")] = 5,
    overrides: Annotated[str, typer.Option(help="Settings of every run, separated by spaces.")] = "",
    config: Annotated[Path, typer.Option(help="Settings that the methods vary.")] = EXAMPLE,
    runs: Annotated[Path, typer.Option(help="Where the runs go; finished ones are not repeated.")] = Path(
        "runs/bench/dppo"
    ),
) -> None:
    """Train every method with every seed; seconds, evaluation apart, to GRPO's final held-out accuracy."""
    chosen = [name.strip() for name in methods.split(",")]
    for name in chosen:
        if name not in METHODS:
            raise UserError(f"methods: '{name}' is not a method{nearest(name, METHODS)}")
    chosen = ["grpo", *(name for name in chosen if name != "grpo")]
    rows = []
    for seed in range(seeds):  # methods side by side within a seed: the machine's mood is shared
        target, baseline = None, None
        for method, rate in variants(chosen, [float(rate) for rate in rates.split(",")]):
            switches = [text.format(rate=rate) for text in METHODS[method]]
            name = f"{method}-{rate:g}-{seed}" if rate else f"{method}-{seed}"
            settings = _study.settings(
                config, runs / name, seed, [f"evaluation.every={every}", *overrides.split(), *UNPRUNED, *switches]
            )
            curve = learning_curve(_study.trained(settings))
            if target is None:
                target = mean(point["accuracy"] for point in curve[-3:])
            reached = next((point for point in curve if point["accuracy"] >= target), None)
            baseline = baseline or (reached["seconds"] if reached else None)
            rows.append(
                {
                    "method": method,
                    "rate": rate,
                    "seed": seed,
                    "target": target,
                    "seconds_to_target": reached["seconds"] if reached else None,
                    "speedup": baseline / reached["seconds"] if reached and baseline else None,
                    "tokens_generated": (reached or curve[-1])["generated"],
                    "tokens_trained": (reached or curve[-1])["trained"],
                    "seconds": curve[-1]["seconds"],
                    "accuracy": curve[-1]["accuracy"],
                }
            )
            record.show_rows("so far", rows)
    record.publish("dppo", rows, json, summary=summary(rows))


def variants(methods: Sequence[str], rates: Sequence[float]) -> list[tuple[str, float]]:
    """(method, rate) pairs; methods that prune nothing have one, of rate 0."""
    return [(m, rate) for m in methods for rate in (rates if any("{rate}" in s for s in METHODS[m]) else [0.0])]


def learning_curve(metrics: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Each evaluation: held-out accuracy, and the seconds and tokens spent until then (evaluation time left out)."""
    curve, seconds, generated, trained = [], 0.0, 0, 0.0
    for line in metrics:
        if line["step"]:
            seconds += line["seconds_total"] - line.get("seconds_evaluation", 0.0) - line.get("seconds_checkpoint", 0.0)
            generated += line["tokens_generated"]
            trained += line["tokens_trained"]
        if "eval/accuracy" in line and line["step"]:
            curve.append(
                {"accuracy": line["eval/accuracy"], "seconds": seconds, "generated": generated, "trained": trained}
            )
    return curve


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and rate: median speed-up over seeds, its range, and how many seeds reached the target."""
    result = []
    for method, rate in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        group = [row for row in rows if (row["method"], row["rate"]) == (method, rate)]
        speedups = [row["speedup"] for row in group if row["speedup"] is not None]
        result.append(
            {
                "method": method,
                "rate": rate,
                "reached": f"{len(speedups)}/{len(group)}",
                "speedup_median": median(speedups) if speedups else None,
                "speedup_min": min(speedups, default=None),
                "speedup_max": max(speedups, default=None),
                "accuracy": mean(row["accuracy"] for row in group),
                "tokens_trained": mean(row["tokens_trained"] for row in group),
            }
        )
    return result
