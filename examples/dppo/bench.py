"""Seconds to GRPO's accuracy with dynamic pruning and packing, part by part (arXiv 2603.04135)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

from megarl.bench.common import result, training_runs
from megarl.bench.common.choice import chosen
from megarl.bench.common.curve import learning_curve, reached
from megarl.view import table

# What peers run: dense rows by token budget (as dense as dynamic batching gets), every group trained.
PEERS = ["packing.strategy=first_fit", "pruning.drop_zero_variance=false"]
LONGER = "steps=80"  # twice GRPO's: who makes it to the accuracy that GRPO ends with, and when?
PACKED = [LONGER, "packing.strategy=dense", "packing.window=256"]
STRONG = [*PACKED, "pruning.drop_zero_variance=true"]
# Pruned prompts make a step smaller, not its draw larger; draws of fixed size add less noise.
SMALLER = [*STRONG, "pruning.refill=false", "pruning.sampling=fixed"]
BOTH = ["pruning.prompts={rate}", "pruning.completions={rate}"]
LONGEST = "steps=120"  # where steps are so small that these take GRPO's seconds
METHODS = {
    "grpo": [*PEERS],
    "packing": [*PACKED, "pruning.drop_zero_variance=false"],
    "grpo_strong": [*STRONG],  # the strongest fair baseline
    "prompts": [*SMALLER, "pruning.prompts={rate}"],
    "completions": [*SMALLER, "pruning.completions={rate}"],
    "dppo": [*SMALLER, *BOTH, LONGEST],
    "dppo_refilled": [*STRONG, *BOTH],
    # Ours. Every completion has its own chance, so the draws are independent.
    "proportional": [*SMALLER, *BOTH, LONGEST, "pruning.selection=proportional", "pruning.sampling=bernoulli"],
}
RATES = {
    "prompts": [0.5],
    "completions": [0.5],
    "dppo": [0.3, 0.5, 0.7, 0.9],
    "dppo_refilled": [0.5],
    "proportional": [0.7, 0.9],
}
UNPRUNED = ["pruning={}"]
EXAMPLE = Path("examples/dppo/train.yaml")


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first seed; the others follow it.")] = 0,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    rates: Annotated[str, typer.Option(help="Pruning rates, comma-separated; default: each method's.")] = "",
    every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 4,
    overrides: Annotated[str, typer.Option(help="Settings of every run, separated by spaces.")] = "",
    config: Annotated[Path, typer.Option(help="Settings that the methods vary.")] = EXAMPLE,
    runs: Annotated[Path, typer.Option(help="Where the runs go; finished ones are not repeated.")] = Path(
        "runs/bench/dppo"
    ),
) -> None:
    """Train every method with every seed. Print the seconds, without evaluation, to GRPO's final held-out accuracy.

    Accuracies are means over the last three evaluations.
    """
    wanted = chosen(methods, METHODS, "methods")
    wanted = ["grpo", *(name for name in wanted if name != "grpo")]
    asked = [float(rate) for rate in rates.split(",") if rate]
    rows = []
    for seed in range(first_seed, first_seed + seeds):  # a seed's methods run side by side: the machine's load changes
        target = None
        for method, rate in variants(wanted, asked):
            switches = [text.format(rate=rate) for text in METHODS[method]]
            name = f"{method}-{rate:g}-{seed}" if rate else f"{method}-{seed}"
            settings = training_runs.settings(
                config, runs / name, seed, [f"evaluation.every={every}", *overrides.split(), *UNPRUNED, *switches]
            )
            curve = smooth(learning_curve(training_runs.trained(settings)))
            if target is None:
                target = curve[-1]["accuracy"]
            there = reached(curve, target)
            rows.append(
                {
                    "method": method,
                    "rate": rate,
                    "seed": seed,
                    "target": target,
                    "seconds_to_target": there["seconds"] if there else None,
                    "tokens_generated": (there or curve[-1])["generated"],
                    "tokens_trained": (there or curve[-1])["trained"],
                    "seconds": curve[-1]["seconds"],
                    "seconds_rollout": curve[-1]["rollout"],
                    "accuracy": curve[-1]["accuracy"],
                }
            )
            table.show_rows("so far", rows)
    result.publish("dppo", rows, json, summary=summary(rows))


def variants(methods: Sequence[str], rates: Sequence[float] = ()) -> list[tuple[str, float]]:
    """(method, rate) pairs, from `rates` or each method's own. A method that prunes nothing has one, of rate 0."""
    return [(m, rate) for m in methods for rate in ((rates or RATES[m]) if m in RATES else [0.0])]


def smooth(curve: Sequence[dict[str, float]], window: int = 3) -> list[dict[str, float]]:
    """Replace each accuracy by the mean of the last `window`, so that one lucky evaluation does not reach a target."""
    values = [point["accuracy"] for point in curve]
    return [{**point, "accuracy": mean(values[max(0, i + 1 - window) : i + 1])} for i, point in enumerate(curve)]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per method and rate: means over seeds, and how many seeds reached the target.

    `speedup` is GRPO's seconds to the target over the method's with the same seed: median and range.
    `over_strong` is the same against the strongest baseline.
    """
    seconds = {(row["method"], row["rate"], row["seed"]): row["seconds_to_target"] for row in rows}
    result = []
    for method, rate in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        group = [row for row in rows if (row["method"], row["rate"]) == (method, rate)]
        line = {
            "method": method,
            "rate": rate,
            "reached": f"{sum(row['seconds_to_target'] is not None for row in group)}/{len(group)}",
        }
        for name, base in (("speedup", "grpo"), ("over_strong", "grpo_strong")):
            pairs = [(seconds.get((base, 0.0, row["seed"])), row["seconds_to_target"]) for row in group]
            ratios = [before / after for before, after in pairs if before and after]
            line |= {
                name: median(ratios) if ratios else None,
                f"{name}_min": min(ratios, default=None),
                f"{name}_max": max(ratios, default=None),
            }
        for key in ("accuracy", "seconds", "seconds_rollout", "tokens_generated", "tokens_trained"):
            line[key] = mean(row[key] for row in group)
        result.append(line)
    return result
