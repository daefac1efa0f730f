"""Tables in a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from megarl.view.console import console, plain


def show(values: dict[str, Any]) -> None:
    """Print names and values to standard error, one per line."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in values.items():
        table.add_row(plain(key, "bold"), plain(value))
    console(stderr=True).print(table)


def show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, one column per key. Never cut in a file or a pipe."""
    table = Table(title=plain(title))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(plain(column))
    for row in rows:
        table.add_row(*(plain(cell(row.get(column, ""))) for column in columns))
    terminal = console()
    if not terminal.is_terminal:
        terminal.width = 400
    terminal.print(table)


def cell(value: Any) -> str:
    """A value as text: floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
