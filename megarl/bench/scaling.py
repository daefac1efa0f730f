"""How a step's time falls with the number of nodes, from runs in FOLDER/nodes-N (slurm/scaling.sh submits them)."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from megarl.bench.common.result import publish
from megarl.errors import UserError
from megarl.run.directory import read_metrics

PHASES = ("rollout", "train", "sync", "total")


def main(
    folder: Annotated[Path, typer.Argument(help="Holds a run directory nodes-N for each number of nodes N.")],
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
) -> None:
    """Median seconds of each phase by number of nodes, the first step left out; speed-up against the fewest nodes."""
    publish("scaling", rows(folder), json)


def rows(folder: Path) -> list[dict[str, Any]]:
    """One for each run that has more than one step; raises UserError when there is none."""
    found = []
    for run in sorted(folder.glob("nodes-*"), key=lambda run: int(run.name.removeprefix("nodes-"))):
        if not (run / "metrics.jsonl").is_file():
            continue
        steps = [line for line in read_metrics(run) if line["step"] > 1 and "seconds_total" in line]
        if steps:
            tokens = [line["tokens_generated"] / line["seconds_total"] for line in steps]
            times = {f"seconds_{phase}": median(line[f"seconds_{phase}"] for line in steps) for phase in PHASES}
            nodes = int(run.name.removeprefix("nodes-"))
            found.append({"nodes": nodes, "steps": len(steps), "tokens_per_second": median(tokens), **times})
    if not found:
        raise UserError(f"scaling: {folder} holds no run nodes-N of two steps or more; see slurm/scaling.sh")
    for row in found:
        row["speedup"] = found[0]["seconds_total"] / row["seconds_total"]
        row["efficiency"] = row["speedup"] * found[0]["nodes"] / row["nodes"]
    return found
