"""Tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show(values: dict[str, Any]) -> None:
    """Print names and values to standard error, one per line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in values.items():
        table.add_row(f"[bold]{key}", str(value))
    Console(stderr=True, highlight=False).print(table)


def show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, one column per key. Never cut in a file or a pipe."""
    table = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(cell(row.get(column, "")) for column in columns))
    console = Console()
    if not console.is_terminal:
        console.width = 400
    console.print(table)


def cell(value: Any) -> str:
    """A value as text: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
