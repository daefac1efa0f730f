"""What the commands do, with progress on the terminal. `cli` only parses, without heavy imports."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from checkpoints_conv.average import Average
from checkpoints_conv.checkpoint import Checkpoint
from checkpoints_conv.classic import ClassicWriter
from checkpoints_conv.convert import Plan, convert, plan
from checkpoints_conv.formats import open_checkpoint
from checkpoints_conv.hf_writer import HfWriter
from checkpoints_conv.torch_dist import TorchDistWriter
from checkpoints_conv.unit import Writer
from checkpoints_conv.verify import Comparison, compare, misplaced
from megarl.errors import UserError, nearest
from megarl.models.families import rules
from megarl.models.files.tensor_io import loaded
from megarl.models.layout import Layout
from megarl.models.rules import Spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def hf_to_megatron(
    source: Path,
    destination: Path,
    layout: Layout,
    classic: bool = False,
    spec: Spec = "te",
    dtype: str | None = None,
    workers: int = 2,
    dry_run: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Convert a model folder to torch_dist, after checking `layout`, or to classic files of `layout`."""
    checkpoint = open_checkpoint(source, allow_pickle=allow_pickle)
    layout.check(checkpoint.model)
    writer: Writer = TorchDistWriter(checkpoint.model)
    if classic:
        writer = ClassicWriter(checkpoint.model, layout, spec)
    run(plan(checkpoint, writer, destination, DTYPES[dtype] if dtype else None), workers, dry_run)


def megatron_to_hf(
    source: Path,
    destination: Path,
    config: Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    workers: int = 2,
    dry_run: bool = False,
) -> None:
    """Convert a Megatron checkpoint of either format and any layout to a model folder."""
    checkpoint = open_checkpoint(source, config)
    writer = HfWriter(checkpoint.model, shard_bytes)
    run(plan(checkpoint, writer, destination, DTYPES[dtype] if dtype else None), workers, dry_run)


def reshard(
    source: Path,
    destination: Path,
    layout: Layout,
    spec: Spec = "te",
    config: Path | None = None,
    workers: int = 2,
    dry_run: bool = False,
) -> None:
    """Convert any checkpoint to classic files of another layout."""
    checkpoint = open_checkpoint(source, config)
    run(plan(checkpoint, ClassicWriter(checkpoint.model, layout, spec), destination), workers, dry_run)


def verify(a: Path, b: Path, config: Path | None = None) -> bool:
    """Compare two checkpoints bit by bit and print what differs. Returns whether they are equal."""
    compared = list(compare(_open(a, config), _open(b, config)))
    differing = [c for c in compared if not c.equal]
    console = _wide_console()
    if differing:
        console.print(difference_table(differing))
        console.print(f"{len(differing)} of {len(compared)} tensors differ")
        return False
    rounded = sum(c.dtypes[0] != c.dtypes[1] for c in compared)
    console.print(
        f"{len(compared)} tensors, all equal" + (f", {rounded} in the narrower of two types" if rounded else "")
    )
    return True


def inspect(source: Path, config: Path | None = None) -> None:
    """Print every tensor's name, Megatron name, shape, type, bytes and norm, and totals."""
    table = Table("tensor", "Megatron", "shape", "type", "bytes", "norm")
    count = total = 0
    checkpoint = open_checkpoint(source, config)
    checkpoint.check_whole()
    for rule in (rule for rule in rules(checkpoint.model) if not rule.copy):
        for name, values in checkpoint.parts(rule).items():
            tensor = loaded(values)
            kind, norm = str(tensor.dtype).removeprefix("torch."), tensor.float().norm().item()
            table.add_row(name, rule.megatron, str(list(tensor.shape)), kind, f"{tensor.nbytes:,}", f"{norm:.6g}")
            count, total = count + 1, total + tensor.nbytes
    console = _wide_console()
    console.print(table)
    console.print(
        f"{source}: {checkpoint.format}, {checkpoint.model.family}, {checkpoint.model.parameters():,} parameters in "
        f"{count} tensors, {total:,} bytes in {len(checkpoint.files())} files"
    )


def compare_all(a: Path, b: Path, config: Path | None = None) -> None:
    """Print how much every tensor of two checkpoints differs."""
    compared = list(compare(_open(a, config), _open(b, config)))
    console = _wide_console()
    console.print(difference_table(compared))
    furthest = max(compared, key=lambda c: c.max_difference)
    differing = sum(not c.equal for c in compared)
    console.print(
        f"{differing} of {len(compared)} tensors differ; largest {furthest.max_difference:.3g}: {furthest.name}"
    )


def average(
    sources: list[Path], destination: Path, config: Path | None = None, workers: int = 2, dry_run: bool = False
) -> None:
    """Write the mean of checkpoints of one model as a model folder."""
    mean = Average([_open(path, config) for path in sources])
    run(plan(mean, HfWriter(mean.model), destination), workers, dry_run)


def parse_layout(words: list[str]) -> Layout:
    """`["tp=2", "pp=4"]` → Layout(tp=2, pp=4)."""
    sizes = {}
    known = ("tp", "pp", "vpp", "ep")
    for word in words:
        key, equals, value = word.partition("=")
        if key not in known or not equals:
            raise UserError(f"layout: {word!r} is unknown{nearest(key, known)}; write e.g. tp=2")
        if not value.isdigit() or int(value) < 1:
            raise UserError(f"layout: {word!r}: a size must be a whole number, at least 1")
        sizes[key] = int(value)
    return Layout(**sizes)


def run(plan: Plan, workers: int, dry_run: bool = False) -> None:
    """Print the plan and, unless it is a dry run, convert with a progress bar."""
    console = Console(stderr=True)
    table = Table(show_header=False, box=None)
    for key, value in plan.summary().items():
        table.add_row(key, str(value))
    console.print(table)
    if dry_run:
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("converting", total=sum(unit.nbytes for unit in plan.units))
        resumed = convert(plan, workers, lambda nbytes: progress.advance(task, nbytes))
    if resumed:
        console.print(f"{resumed} of {len(plan.units)} parts were already there from an interrupted run")
    console.print(f"wrote {plan.destination}")


def difference_table(differing: list[Comparison]) -> Table:
    """One row for each comparison."""
    guesses = misplaced([c for c in differing if not c.equal])
    table = Table("tensor", "Megatron", "shape", "differing values", "max |a - b|", "")
    for c in differing:
        row = (c.name, c.megatron, str(list(c.shape)), f"{c.differing:,}", f"{c.max_difference:.3g}")
        table.add_row(*row, guesses.get(c.name, ""))
    return table


def _wide_console() -> Console:
    """A console that keeps full names in files and pipes."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _open(path: Path, config: Path | None) -> Checkpoint:
    """Open a checkpoint; `config` is used only if it has no config.json."""
    return open_checkpoint(path) if (path / "config.json").is_file() else open_checkpoint(path, config)
