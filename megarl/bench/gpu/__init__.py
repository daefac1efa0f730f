"""`megarl bench gpu`: the first ten minutes on GPUs: gradients, speed, memory, FP8, in parts that may fail alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megarl.bench.common.choice import chosen
from megarl.bench.gpu import results
from megarl.bench.gpu.part import FULL, TINY
from megarl.bench.gpu.parts import PARTS, lacking
from megarl.bench.gpu.runner import PATIENCE, run
from megarl.errors import RunError, UserError
from megarl.runtime import device
from megarl.view.table import show_rows

RESULTS, REHEARSAL = "docs/gpu_results", "runs/gpu_rehearsal"
BUSY = 20.0  # patience in the rehearsal: a machine without GPUs may be busy with anything


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="Parts that do not fit into so many are skipped.")] = 10.0,
    only: Annotated[list[str] | None, typer.Option(help="Only this part; may be given again.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help=f"Tiny sizes on the CPU, to try the command; writes {REHEARSAL}.*.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help=f"The rows; default: {RESULTS}.json, none with --only.")] = None,
    report: Annotated[
        Path | None, typer.Option(help=f"A page of them; default: {RESULTS}.md, none with --only.")
    ] = None,
) -> None:
    """Measure this machine's GPUs, part by part. Code 1 if a part failed."""
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    elif not device.on_cuda():
        raise UserError("gpu: torch sees no CUDA device; on a CPU, try the command with --rehearse")
    names = chosen(only, [part.name for part in PARTS], "only") if only else None
    parts = [part for part in PARTS if names is None or part.name in names]
    if names is None:
        stem = REHEARSAL if rehearse else RESULTS
        json, report = json or Path(f"{stem}.json"), report or Path(f"{stem}.md")
    rows: list[results.Row] = []
    scale, patience = (TINY, BUSY) if rehearse else (FULL, PATIENCE)
    for row in run(parts, scale, minutes, lambda part: lacking(part, rehearse), patience):
        rows.append(row)
        results.save(rows, json, report, len(rows) == len(parts), rehearse)
        typer.echo(f"{row['outcome']:9} {row['part']}: {results.brief(row)}")
    show_rows("gpu", [{"part": row["part"], "outcome": row["outcome"], "seconds": row["seconds"]} for row in rows])
    if failed := [row["part"] for row in rows if row["outcome"] == "failed"]:
        where = f"; the errors are in {report}" if report else ""
        raise RunError(f"gpu: {len(failed)} of {len(rows)} parts failed: {'; '.join(failed)}{where}")
