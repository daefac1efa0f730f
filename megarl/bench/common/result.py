"""A benchmark's result: a printed table and, on request, a JSON file that says how it was made."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from megarl.run import provenance
from megarl.run.atomic import write_text
from megarl.view.table import show_rows


def publish(
    name: str,
    rows: list[dict[str, Any]],
    file: Path | None = None,
    shown: list[dict[str, Any]] | None = None,
    **extra: Any,
) -> None:
    """Print `shown` (default: `rows`) as a table.

    `{"command", "commit", "machine", "rows", **extra}` goes to `file` when given.
    """
    show_rows(name, rows if shown is None else shown)
    if file is not None:
        write(rows, file, **extra)


def write(rows: list[dict[str, Any]], file: Path, **extra: Any) -> None:
    """Write `{"command", "commit", "machine", "rows", **extra}` to `file`, whole or not at all."""
    command, commit = " ".join(["megarl", *sys.argv[1:]]), provenance.commit(changes=True)
    result = {"command": command, "commit": commit, "machine": machine(), "rows": rows, **extra}
    write_text(file, json.dumps(result, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """The machine that measured; nothing that identifies the host."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
