"""`megarl convert …` and `python -m checkpoints_conv …`: the signatures; `commands` does the work."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megarl.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Convert checkpoints between Hugging Face and Megatron, and prove it.")


class Type(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Format(StrEnum):
    torch_dist = "torch-dist"
    classic = "classic"


class LayerSpec(StrEnum):
    te = "te"
    local = "local"


Source = Annotated[
    Path, typer.Argument(help="Folder of the checkpoint: a Hugging Face model, or Megatron's files of either format.")
]
Destination = Annotated[Path, typer.Argument(help="Folder to write; must not exist, or be empty.")]
LayoutWords = Annotated[
    list[str] | None,
    typer.Argument(
        help="Parallel sizes: tp (tensor), pp (pipeline), vpp (chunks per stage), ep (expert); default 1.",
        metavar="[tp=N pp=N …]",
    ),
]
Names = Annotated[LayerSpec, typer.Option(help="Layer names of classic files: Transformer Engine's or Megatron's own.")]
Config = Annotated[Path | None, typer.Option(help="config.json, or its folder, if the checkpoint has none.")]
Cast = Annotated[Type | None, typer.Option(help="Cast every tensor; default: keep each tensor's type.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads. Each needs at most a few times the largest tensor.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read *.bin weights (only tensors are unpickled).")]
Output = Annotated[Format, typer.Option(help="torch-dist loads under any layout; classic is one file per rank.")]
ShardSize = Annotated[float, typer.Option(min=0.001, help="Largest safetensors file, in GB.")]

WORKERS = min(4, os.cpu_count() or 1)


@app.command()
def hf_to_megatron(
    source: Source,
    destination: Destination,
    layout: LayoutWords = None,
    format: Output = Format.torch_dist,
    spec: Names = LayerSpec.te,
    dtype: Cast = None,
    workers: Workers = WORKERS,
    dry_run: DryRun = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Hugging Face → Megatron. torch-dist loads under any layout; a given one is only checked against the model."""
    from checkpoints_conv import commands

    classic = format is Format.classic
    sizes = commands.parse_layout(layout or [])
    commands.hf_to_megatron(source, destination, sizes, classic, spec.value, dtype, workers, dry_run, allow_pickle)


@app.command()
def megatron_to_hf(
    source: Source,
    destination: Destination,
    config: Config = None,
    dtype: Cast = None,
    shard_size: ShardSize = 5.0,
    workers: Workers = WORKERS,
    dry_run: DryRun = False,
) -> None:
    """Megatron (either format, any layout, a training run's checkpoint too) → Hugging Face."""
    from checkpoints_conv import commands

    commands.megatron_to_hf(source, destination, config, dtype, int(shard_size * 10**9), workers, dry_run)


@app.command()
def reshard(
    source: Source,
    destination: Destination,
    layout: LayoutWords = None,
    spec: Names = LayerSpec.te,
    config: Config = None,
    workers: Workers = WORKERS,
    dry_run: DryRun = False,
) -> None:
    """Merge or split: any checkpoint → classic files of another layout. Default: one rank."""
    from checkpoints_conv import commands

    sizes = commands.parse_layout(layout or [])
    commands.reshard(source, destination, sizes, spec.value, config, workers, dry_run)


@app.command()
def verify(a: Source, b: Source, config: Config = None) -> None:
    """Compare two checkpoints of any formats bit by bit. If they differ: a table and exit code 1."""
    from checkpoints_conv import commands

    if not commands.verify(a, b, config):
        raise typer.Exit(1)


@app.command()
def inspect(source: Source, config: Config = None) -> None:
    """List the tensors of a checkpoint in any format: names, shapes, types, bytes and norms."""
    from checkpoints_conv import commands

    commands.inspect(source, config)


@app.command()
def compare(a: Source, b: Source, config: Config = None) -> None:
    """Show how much two checkpoints differ, e.g. before and after training: max |a - b| of every tensor."""
    from checkpoints_conv import commands

    commands.compare_all(a, b, config)


@app.command()
def average(
    sources: Annotated[list[Path], typer.Argument(help="Folders of checkpoints of one model, of any format.")],
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.")],
    config: Config = None,
    workers: Workers = WORKERS,
    dry_run: DryRun = False,
) -> None:
    """Average the weights of several checkpoints (in float32) into one Hugging Face folder."""
    from checkpoints_conv import commands

    commands.average(sources, to, config, workers, dry_run)


def main() -> None:
    """Run a command. A UserError is one line and exit code 2."""
    try:
        app()
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
