"""The conversion: any checkpoint, any writer, unit by unit, in parallel, resumable, completed by one rename."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoints_conv.checkpoint import Checkpoint
from checkpoints_conv.unit import Unit, Writer, units_of
from megarl.errors import UserError
from megarl.models.files.companions import copy_companions, set_dtype
from megarl.models.files.tensor_io import Values, loaded
from megarl.models.rules import Rule


@dataclass(frozen=True)
class Plan:
    """What a conversion will do."""

    source: Checkpoint
    writer: Writer
    destination: Path
    dtype: torch.dtype | None  # None: each tensor keeps its own
    units: list[Unit]

    @property
    def partial(self) -> Path:
        """Where the output is until it is complete."""
        return self.destination.with_name(self.destination.name + ".partial")

    def summary(self) -> dict[str, Any]:
        model = self.source.model
        dtypes = sorted({str(dtype).removeprefix("torch.") for unit in self.units for dtype in unit.dtypes})
        return {
            "source": f"{os.path.commonpath([file.parent for file in self.source.files()])} ({self.source.format})",
            "destination": f"{self.destination} ({', '.join(f'{k}={v}' for k, v in self.writer.settings.items())})",
            "model": f"{model.family}, {model.layers} layers, hidden {model.hidden}",
            "parameters": f"{model.parameters():,}",
            "tensors": sum(len(unit.rules) for unit in self.units),
            "type": ", ".join(dtypes),
            "bytes": f"{self.writer.nbytes(self.units):,}",
        }


def plan(source: Checkpoint, writer: Writer, destination: Path, dtype: torch.dtype | None = None) -> Plan:
    """Check everything that needs no weights. Raises UserError."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: is not empty, and nothing is overwritten; choose another destination")
    source.check_whole()
    units = units_of(writer.rules(), lambda rule: dtype or source.dtype(rule))
    return Plan(source, writer, destination, dtype, units)


def convert(plan: Plan, workers: int = 2, advance: Callable[[int], None] = lambda nbytes: None) -> int:
    """Run the plan. Returns how many units an earlier, interrupted run had already written.

    Memory: a few bands of rows per thread (`workers` of them), and one tensor while its type changes. `advance` gets
    the bytes of each finished tensor. After an interruption nothing exists at the destination, and the next run
    continues.
    """
    plan.partial.mkdir(parents=True, exist_ok=True)
    with _journal(plan) as journal, _disk_errors(plan):
        done = journal.done()
        left = [unit for unit in plan.units if unit.index not in done]
        needed, free = plan.writer.nbytes(left), shutil.disk_usage(plan.partial).free
        if needed > free:
            raise UserError(f"{plan.destination}: needs {needed:,} bytes; the disk has {free:,} free")
        try:
            plan.writer.lay_out(plan.partial, plan.units)
            for unit in plan.units:
                if unit.index in done:
                    advance(unit.nbytes)
            _run(lambda unit: journal.add(unit, plan.writer.write(unit, _tensors(plan, unit, advance))), left, workers)
            plan.writer.finish(plan.units, journal.done())
        finally:
            plan.writer.close()
        _copy_companions(plan)
        sync(plan.partial)
        journal.remove()
    if plan.destination.exists():
        plan.destination.rmdir()
    plan.partial.rename(plan.destination)
    return len(done)


def _tensors(plan: Plan, unit: Unit, advance: Callable[[int], None]) -> Iterator[tuple[Rule, Mapping[str, Values]]]:
    for rule, dtype in unit.items():
        parts = plan.source.parts(rule)
        yield rule, {name: t if t.dtype == dtype else loaded(t).to(dtype) for name, t in parts.items()}
        advance(sum(prod(part.shape) for part in rule.parts) * dtype.itemsize)


def _run(work: Callable[[Unit], None], units: list[Unit], workers: int) -> None:
    """`work` on each unit in threads. The first failure stops the rest and is raised."""
    with ThreadPoolExecutor(workers) as pool:
        # Largest first, so that the threads end together.
        futures = [pool.submit(work, unit) for unit in sorted(units, key=lambda unit: -unit.nbytes)]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    for future in finished:
        future.result()


class _Journal:
    """The units already written, in a folder inside the partial output, so that a later run can continue."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def done(self) -> dict[int, list]:
        return {int(file.stem): json.loads(file.read_text()) for file in self.folder.glob("*.json")}

    def add(self, unit: Unit, record: list) -> None:
        partial = self.folder / f"{unit.index}.tmp"
        partial.write_text(json.dumps(record))
        partial.rename(self.folder / f"{unit.index}.json")

    def remove(self) -> None:
        shutil.rmtree(self.folder)


@contextmanager
def _journal(plan: Plan) -> Iterator[_Journal]:
    """The journal of this conversion, locked against other processes. UserError if it is another conversion's."""
    folder = plan.partial / ".journal"
    if not folder.is_dir() and any(plan.partial.iterdir()):
        raise UserError(f"{plan.partial}: is not an interrupted conversion; move it away")
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{plan.partial}: another process is writing to it") from None
        identity = folder / "identity"
        if identity.is_file() and identity.read_text() != _identity(plan):
            raise UserError(f"{plan.partial}: began with other files or settings; delete it to start again")
        identity.write_text(_identity(plan))
        yield _Journal(folder)


def _identity(plan: Plan) -> str:
    """Source files with sizes and times, and all settings that change the output."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in plan.source.files()]
    return json.dumps({"files": files, "settings": plan.writer.settings, "dtype": str(plan.dtype)}, sort_keys=True)


@contextmanager
def _disk_errors(plan: Plan) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{plan.partial}: no space left on the disk; free some and run again to continue") from None
        raise


def _copy_companions(plan: Plan) -> None:
    """Copy what is beside the weights.

    A config.json from elsewhere (such as the model that training began with) gets the type of these weights.
    """
    copy_companions(plan.source.folder, plan.partial)
    dtypes = {dtype for unit in plan.units for dtype in unit.dtypes}
    borrowed = not any(file.resolve().is_relative_to(plan.source.folder.resolve()) for file in plan.source.files())
    if len(dtypes) == 1 and (plan.dtype is not None or borrowed):
        set_dtype(plan.partial / "config.json", dtypes.pop())


def sync(folder: Path) -> None:
    """Wait until all of `folder` is on the disk."""
    for path in (*folder.rglob("*"), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
