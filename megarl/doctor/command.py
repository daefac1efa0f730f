"""The command: one line per check, and exit code 1 if one failed."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from megarl.config import Settings
from megarl.doctor import data, machine, peers, software
from megarl.doctor.finding import Finding
from megarl.errors import RunError
from megarl.view.console import console, plain

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def examine(settings: Settings | None, gpus: int | None) -> Iterator[Finding]:
    """All findings of this node. Without settings, only those that need none. Under srun, the nodes also connect."""
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    yield from software.versions()
    yield from machine.devices(gpus)
    if settings is not None:
        yield from machine.chosen(settings)
        yield from software.precision(settings)
    yield from machine.limits()
    yield from machine.fabric(tasks)
    if settings is None:
        return
    yield from machine.disk(settings)
    yield from software.engines(settings)
    yield from data.prompt(settings)
    if tasks > 1 and "MASTER_ADDR" in env:
        rank = int(env["SLURM_PROCID"])
        yield from peers.meet(rank, tasks, env["MASTER_ADDR"], int(env["MASTER_PORT"]), settings.run)


def doctor(settings: Settings | None, gpus: int | None, file: Path | None) -> None:
    """Print the findings and write them to `file`. Raises RunError naming every failure."""
    host = socket.gethostname()
    findings = list(examine(settings, gpus))
    table = Table(title=host, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for each in findings:
        hint = f"  → {each.hint}" if each.hint else ""
        table.add_row(plain(each.status, STYLES[each.status]), plain(each.check), plain(f"{each.text}{hint}"))
    console(width=None if os.isatty(1) else 200).print(table)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"host": host, "findings": [asdict(f) for f in findings]}, indent=1) + "\n")
    failed = [f"{f.check}: {f.text} → {f.hint}" for f in findings if f.status == "fail"]
    if failed:
        raise RunError(f"doctor: {host}: {'; '.join(failed)}")
