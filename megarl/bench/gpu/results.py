"""The rows as a JSON file and as a page, written anew after every part: a run that is cut leaves what it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl import __version__
from megarl.bench.common import result
from megarl.run.atomic import write_text
from megarl.view.table import cell

Row = dict[str, Any]
REHEARSED = "A rehearsal with tiny sizes on a CPU. It proves that the command works and says nothing about GPUs."


def save(rows: list[Row], json: Path | None, page: Path | None, complete: bool, rehearsal: bool) -> None:
    """Write the files that are named, each whole or not at all."""
    if json:
        result.write(rows, json, complete=complete, rehearsal=rehearsal)
    if page:
        write_text(page, markdown(rows, complete, rehearsal))


def markdown(rows: list[Row], complete: bool, rehearsal: bool) -> str:
    """One table of what was measured, then what failed, with the last lines of the error, then what was skipped."""
    lines = ["# Results on GPUs", "", REHEARSED if rehearsal else f"Made by `megarl bench gpu` on {_machine()}.", ""]
    if not complete:
        lines += ["The run was cut or is still going on.", ""]
    measured, failed, skipped = (_of(rows, outcome) for outcome in ("measured", "failed", "skipped"))
    if measured:
        lines += ["| part | seconds | measured |", "|---|---|---|"]
        lines += [f"| {_cell(row['part'])} | {row['seconds']} | {_cell(brief(row))} |" for row in measured] + [""]
    for row in failed:
        lines += [f"## Failed: {row['part']}", "", f"After {row['seconds']} s:", "", *_quoted(row["error"]), ""]
    if skipped:
        lines += ["## Skipped", "", *(f"- {row['part']}: {row['error']}" for row in skipped), ""]
    return "\n".join(lines)


def brief(row: Row) -> str:
    """A row's metrics, or the last line of its error."""
    if "metrics" in row:
        return ", ".join(f"{name} {cell(value)}" for name, value in row["metrics"].items())
    return str(row["error"]).rpartition("\n")[2]


def _machine() -> str:
    found = result.machine()
    return f"{found['gpu']}, torch {found['torch']}, megarl {__version__}"


def _of(rows: list[Row], outcome: str) -> list[Row]:
    return [row for row in rows if row["outcome"] == outcome]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _quoted(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]
