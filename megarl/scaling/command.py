"""`megarl scaling`: studies from one YAML file (examples/scaling/README.md)."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from megarl.bench.common.result import publish
from megarl.errors import DeadlineExceeded, RunError, UserError
from megarl.scaling import cells, plot, table
from megarl.scaling.study import EFFICIENCY, Study, read

SBATCH_TIMEOUT = 120.0  # seconds

app = typer.Typer(help="Scaling studies from one YAML file.", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False)  # fmt: skip
File = Annotated[Path, typer.Argument(help="YAML file of a study.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Where cells and results are kept; default: runs/scaling/NAME.")]
Json = Annotated[Path | None, typer.Option(help="Write the result to this file, and the plots beside it.")]


@app.command()
def run(file: File, out: Out = None, json: Json = None) -> None:
    """Measure or predict the cells that are missing, then show."""
    study, folder = _open(file, out)
    if study.how == "slurm":
        raise UserError("how: the cells of a slurm study are jobs of several nodes; use `megarl scaling submit`")
    cells.check(study, folder)
    for number in track(cells.missing(study, folder), study.name, console=Console(stderr=True)):
        cells.do(study, number, folder)
    _show(study, folder, json)


@app.command()
def cell(file: File, number: int, out: Out = None) -> None:
    """Measure or predict one cell; a Slurm array calls this."""
    study, folder = _open(file, out)
    cells.do(study, number, folder)


@app.command()
def submit(
    file: File,
    out: Out = None,
    at_once: Annotated[int, typer.Option(min=1, help="Cells that run at the same time, of one node each.")] = 4,
    sbatch: Annotated[str, typer.Option(help="Further options of sbatch.")] = "",
) -> None:
    """Send the missing cells to Slurm: as one job array, or as one job per cell if the study names a `script`.

    A second call sends only what is still missing.
    """
    study, folder = _open(file, out)
    cells.check(study, folder)
    numbers = cells.missing(study, folder)
    if not numbers:
        _show(study, folder)
        return
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    options = [*shlex.split(sbatch), f"--chdir={os.getcwd()}"]
    if study.how == "slurm":
        sent = [_send(study, number, folder, options) for number in numbers][-1]
    else:
        task = [sys.executable, "-m", "megarl.cli", "scaling", "cell", str(file.resolve())]
        line = shlex.join(task) + f" $SLURM_ARRAY_TASK_ID --out {shlex.quote(str(folder))}"
        array = ",".join(map(str, numbers)) + f"%{at_once}"
        sent = _sbatch([f"--job-name={study.name}", f"--array={array}", f"--output={folder / 'logs' / '%a.log'}",
                        *options, f"--wrap={line}"])  # fmt: skip
    typer.echo(f"{sent}: {len(numbers)} cells; afterwards: megarl scaling show {file}")


@app.command()
def show(file: File, out: Out = None, json: Json = None) -> None:
    """Write results.csv, summary.csv and the plots; print the table and the laws."""
    _show(*_open(file, out), json)


def _open(file: Path, out: Path | None) -> tuple[Study, Path]:
    """The study and its folder, absolute so that a Slurm job and a shell elsewhere give a run the same name."""
    study = read(file)
    return study, (out or Path("runs") / "scaling" / study.name).resolve()


def _send(study: Study, number: int, folder: Path, options: list[str]) -> str:
    """Submit a cell's own job: the study's script on the cell's number of nodes."""
    nodes, run, overrides = cells.job(study, number, folder)
    log = folder / "logs" / f"{number}.log"
    words = [f"--job-name={study.name}-{number}", f"--nodes={nodes}", f"--output={log}", *options]
    return _sbatch([*words, str(study.script), *overrides], RUN=str(run))


def _sbatch(words: list[str], **environment: str) -> str:
    try:
        sent = subprocess.run(
            ["sbatch", *words], capture_output=True, text=True, env=os.environ | environment, timeout=SBATCH_TIMEOUT
        )
    except FileNotFoundError:
        raise UserError("submit: there is no sbatch on this machine; use `run`") from None
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded("sbatch to take the job", SBATCH_TIMEOUT) from None
    if sent.returncode:
        raise RunError(f"sbatch: {' '.join(sent.stderr.split())}")
    return sent.stdout.strip()


def _show(study: Study, folder: Path, json: Path | None = None) -> None:
    rows = cells.results(study, folder)
    if not rows:
        raise UserError(f"study: {folder} has no result yet")
    points = table.summary(study, rows)
    table.write(folder / "results.csv", rows)
    table.write(folder / "summary.csv", points)
    metrics = [name for metric in study.y for name in (metric, f"{metric}_error")]
    wanted = {*table.varied(study), *metrics, EFFICIENCY, "fits", "seeds"}
    columns = [key for key in dict.fromkeys(key for row in points for key in row) if key in wanted]
    shown = [{key: row.get(key) for key in columns} for row in points]
    fitted = {metric: plot.laws(study, rows, metric) for metric in study.y}
    laws = {metric: {name: law.as_dict() for name, law in lines.items()} for metric, lines in fitted.items()}
    left = len(cells.missing(study, folder))
    publish(study.name, shown, json, laws=laws, missing=left)
    for metric, lines in fitted.items():
        picture = plot.svg(study, rows, points, metric)
        (folder / f"{metric}.svg").write_text(picture)
        if json:
            json.with_name(f"{json.stem}_{metric}.svg").write_text(picture)
        for name, law in lines.items():
            typer.echo(f"{metric}{f' ({name})' if name else ''} = {law}, x = {study.x}")
    typer.echo(f"{folder}: {len(rows)} cells done, {left} missing")
