"""Scaling studies from one YAML file: examples/scaling/README.md.

python tools/scaling.py run STUDY.yaml      does what is missing here, then shows what there is
python tools/scaling.py submit STUDY.yaml   sends what is missing to Slurm, as one job array
python tools/scaling.py show STUDY.yaml     tables, laws and plots of what there is
"""

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

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file: megarl beside it, and `examples` for rewards

from megarl.bench.common.result import publish
from megarl.errors import RunError, UserError
from megarl.scaling import cells, plot, table
from megarl.scaling.study import EFFICIENCY, Study, read

app = typer.Typer(help="Scaling studies from one YAML file.", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False)  # fmt: skip
File = Annotated[Path, typer.Argument(help="YAML file of a study.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Where cells and results are kept; default: runs/scaling/NAME.")]
Json = Annotated[Path | None, typer.Option(help="Write the result to this file, and the plots beside it.")]


@app.command()
def run(file: File, out: Out = None, json: Json = None) -> None:
    """Measure or predict the cells that are missing, then show."""
    study, folder = _open(file, out)
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
    at_once: Annotated[int, typer.Option(min=1, help="So many cells at a time.")] = 4,
    sbatch: Annotated[str, typer.Option(help="Further options of sbatch.")] = "",
) -> None:
    """Send the cells that are missing to Slurm, as one job array; run again later, it sends only what is left."""
    study, folder = _open(file, out)
    cells.check(study, folder)
    numbers = cells.missing(study, folder)
    if not numbers:
        _show(study, folder)
        return
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    task = [sys.executable, str(Path(__file__).resolve()), "cell", str(file.resolve())]
    line = shlex.join(task) + f" $SLURM_ARRAY_TASK_ID --out {shlex.quote(str(folder))}"
    array = ",".join(map(str, numbers)) + f"%{at_once}"
    command = ["sbatch", f"--job-name={study.name}", f"--array={array}", f"--output={folder / 'logs' / '%a.log'}",
               *shlex.split(sbatch), f"--chdir={os.getcwd()}", f"--wrap={line}"]  # fmt: skip
    try:
        sent = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("submit: there is no sbatch on this machine; use `run`") from None
    if sent.returncode:
        raise RunError(f"sbatch: {' '.join(sent.stderr.split())}")
    typer.echo(f"{sent.stdout.strip()}: {len(numbers)} cells; afterwards: python tools/scaling.py show {file}")


@app.command()
def show(file: File, out: Out = None, json: Json = None) -> None:
    """Write results.csv, summary.csv and the plots; print the table and the laws."""
    _show(*_open(file, out), json)


def _open(file: Path, out: Path | None) -> tuple[Study, Path]:
    """The folder is absolute: a Slurm job and a shell elsewhere name a run alike."""
    study = read(file)
    return study, (out or Path("runs") / "scaling" / study.name).resolve()


def _show(study: Study, folder: Path, json: Path | None = None) -> None:
    rows = cells.results(study, folder)
    if not rows:
        raise UserError(f"study: {folder} holds no result yet")
    points = table.summary(study, rows)
    table.write(folder / "results.csv", rows)
    table.write(folder / "summary.csv", points)
    figures = [name for figure in study.y for name in (figure, f"{figure}_error")]
    wanted = {*table.varied(study), *figures, EFFICIENCY, "fits", "seeds"}
    columns = [key for key in dict.fromkeys(key for row in points for key in row) if key in wanted]
    shown = [{key: row.get(key) for key in columns} for row in points]
    fitted = {figure: plot.laws(study, rows, figure) for figure in study.y}
    told = {figure: {name: law.told() for name, law in of.items()} for figure, of in fitted.items()}
    left = len(cells.missing(study, folder))
    publish(study.name, shown, json, program="python tools/scaling.py", laws=told, missing=left)
    for figure, of in fitted.items():
        picture = plot.svg(study, rows, points, figure)
        (folder / f"{figure}.svg").write_text(picture)
        if json:
            json.with_name(f"{json.stem}_{figure}.svg").write_text(picture)
        for name, law in of.items():
            typer.echo(f"{figure}{f' ({name})' if name else ''} = {law}, x = {study.x}")
    typer.echo(f"{folder}: {len(rows)} cells done, {left} missing")


if __name__ == "__main__":
    try:
        app()
    except UserError as e:
        print("\n".join(f"scaling: {line}" for line in str(e).splitlines()), file=sys.stderr)
        sys.exit(2)
    except RunError as e:
        print(f"scaling: {e}", file=sys.stderr)
        sys.exit(1)
