"""Step-GRPO's table (arXiv 2604.16890) in miniature: the quick start's reasoner, every ablation, several seeds."""

from __future__ import annotations

import json as json_lib
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

from megarl.bench.common import result, training_runs
from megarl.bench.common.choice import chosen
from megarl.view import table

PLAIN = ["rollout.early_exit.enabled=false"]
EXITS = ["rollout.early_exit.enabled=true"]
METHODS: dict[str, list[str] | None] = {
    "vanilla": None,  # the taught model, untrained
    "grpo": [*PLAIN, "reward.shaping=none"],
    "grpo_sequence_mean": [*PLAIN, "reward.shaping=none", "algorithm={preset: grpo}"],  # GRPO's own loss
    "grpo_length_penalty": [*PLAIN, "reward.shaping=length_penalty", "reward.length_penalty=0.001"],
    "step_grpo": [*EXITS, "reward.shaping=step_aware"],
    "no_step_reward": [*EXITS, "reward.shaping=none"],
    "no_truncation": [*PLAIN, "reward.shaping=step_aware"],
    "all_sample_mean": [*EXITS, "reward.shaping=step_aware", "reward.step_mean=all"],
    "exit_half": [*EXITS, "reward.shaping=step_aware", "rollout.early_exit.exit_fraction=0.5"],  # ours
}
SHARED = [  # settings of all methods
    "evaluation.every=0",
    "pruning.completions=0",
    "rollout.max_response_tokens=256",  # as in evaluation; under a tighter limit, GRPO alone becomes brief
]
TEMPERATURES = [0.6, 1.0]
HELDOUT = Path("examples/quickstart/problems/heldout.jsonl")
LONGER = Path("examples/step_grpo/problems/longer.jsonl")  # evaluated with HELDOUT only: nothing is chosen on it
AVERAGED = ["accuracy", "tokens", "accuracy_t1", "tokens_t1", "rollout_tokens"]
AVERAGED += ["accuracy_longer", "tokens_longer", "accuracy_longer_t1", "tokens_longer_t1"]


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method: 0, 1, …")] = 4,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    overrides: Annotated[str, typer.Option(help="Settings of every run, separated by spaces.")] = "",
    config: Annotated[Path, typer.Option(help="Settings that the methods vary.")] = training_runs.QUICKSTART,
    runs: Annotated[Path, typer.Option(help="Where the runs go; finished ones are not repeated.")] = Path(
        "runs/bench/step_grpo"
    ),
) -> None:
    """Train and evaluate every method with every seed; print accuracy, response tokens and their spread."""
    wanted = chosen(methods, METHODS, "methods")
    rows = []
    for name in wanted:
        for seed in range(seeds):
            rows.append(measure(name, seed, config, runs, overrides.split()))
            table.show_rows("so far", summary(rows))
    result.publish("step_grpo", rows, json, summary=summary(rows))


def measure(method: str, seed: int, base: Path, runs: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """One row: held-out metrics after training with a method and a seed, and the cost of the rollouts."""
    switches = METHODS[method]
    settings = training_runs.settings(
        base, runs / f"{method}-{seed}", seed, [*SHARED, *overrides, *(switches or PLAIN)]
    )
    cost: dict[str, Any] = {"rollout_tokens": 0, "probe_tokens": 0, "seconds": 0.0}
    if switches is not None:
        steps = [line for line in training_runs.trained(settings) if line["step"] > 0]
        cost = {
            "rollout_tokens": sum(line["tokens_generated"] for line in steps),
            "probe_tokens": sum(line["probe_tokens"] for line in steps),
            **confident_exits(settings.run),
            "seconds": sum(line["seconds_total"] for line in steps),
        }
    evaluations = {"": training_runs.evaluated(settings, TEMPERATURES, switches is not None)}
    if settings.data.eval == [HELDOUT]:
        settings.data.eval = [LONGER]
        evaluations["_longer"] = training_runs.evaluated(settings, TEMPERATURES, switches is not None, "longer")
    metrics: dict[str, Any] = {}
    for problems, (cool, warm) in evaluations.items():
        metrics |= {
            f"accuracy{problems}": cool["eval/accuracy"],
            f"tokens{problems}": cool["eval/response_tokens"],
            f"steps{problems}": cool["eval/steps_per_response"],
            f"accuracy{problems}_t1": warm["eval/accuracy"],
            f"tokens{problems}_t1": warm["eval/response_tokens"],
        }
    return {"method": method, "seed": seed, **metrics, **cost}


_LAST_CHECK = re.compile(r"= (\d+) (yes|no)\s*$")


def confident_exits(run: Path) -> dict[str, int]:
    """Count exits by confidence in a run's saved rollouts, by whether the last check before them found the answer.

    Found: the check's sum is the problem's target and its verdict "yes". Right: the graded answer is right.
    """
    counts = {"exits_found": 0, "exits_found_right": 0, "exits_not_found": 0, "exits_not_found_right": 0}
    for file in sorted((run / "rollouts").glob("step_*.jsonl")):
        for line in file.read_text().splitlines():
            row = json_lib.loads(line)
            if row["exit_reason"] != "confident":
                continue
            check = _LAST_CHECK.search(row["response"].partition("</think>")[0])
            target = row["answer"].rpartition(" ")[2]
            kind = "exits_found" if check and check.groups() == (target, "yes") else "exits_not_found"
            counts[kind] += 1
            counts[f"{kind}_right"] += row["verdict"] == "right"
    return counts


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds; shares are over vanilla's response tokens and GRPO's rollout tokens."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    bases = {
        name: {key: mean(row[key] for row in groups[name]) for key in ("tokens", "tokens_t1", "rollout_tokens")}
        for name in ("vanilla", "grpo")
        if name in groups
    }
    result = []
    for method, group in groups.items():
        line: dict[str, Any] = {"method": method, "seeds": len(group)}
        for key in AVERAGED:
            values = [row[key] for row in group if key in row]
            if not values:
                continue
            line[key] = mean(values)
            line[f"{key}_sd"] = stdev(values) if len(values) > 1 else 0.0
        if "vanilla" in bases:
            line["token_share"] = line["tokens"] / bases["vanilla"]["tokens"]
            line["token_share_t1"] = line["tokens_t1"] / bases["vanilla"]["tokens_t1"]
        if "grpo" in bases:
            line["rollout_share"] = line["rollout_tokens"] / bases["grpo"]["rollout_tokens"]
        result.append(line)
    return result
