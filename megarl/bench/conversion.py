"""Converting a multi-GB checkpoint against copying its files on the same disk, from cold caches; and the peak memory.

The model is random, Qwen3-1.7B's sizes with as many layers as fill the gigabytes asked for. Every round copies the
Hugging Face files (copy, then fsync of every file) and runs each conversion in a process of its own, timed from opening
the source to the destination's final name, fsync included, Python's start left out. Before each, all data is written
back and the sources are dropped from the page cache. The caches inside the disk, or under a virtual one, stay as they
are.
"""

from __future__ import annotations

import json as json_format
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from checkpoints_conv.checkpoint import open_checkpoint
from checkpoints_conv.classic import ClassicWriter
from checkpoints_conv.convert import convert, plan
from checkpoints_conv.families import rules
from checkpoints_conv.hf import HfWriter
from checkpoints_conv.layout import Layout
from checkpoints_conv.shape import ModelShape, read_shape
from checkpoints_conv.torch_dist import TorchDistWriter
from checkpoints_conv.unit import Unit, Writer, units_of
from megarl.bench.record import publish
from megarl.errors import UserError

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
LAYOUT = Layout(tp=2, pp=2)  # of the classic files
FILE_BYTES = 10**9  # of the source's files, as on the hub

DIRECTIONS: dict[str, tuple[str, str, Callable[[ModelShape], Writer]]] = {
    "hf to torch_dist": ("hf", "torch_dist", TorchDistWriter),
    "torch_dist to hf": ("torch_dist", "back", lambda model: HfWriter(model, FILE_BYTES)),
    "hf to classic, tp2·pp2": ("hf", "classic", lambda model: ClassicWriter(model, LAYOUT)),
    "classic, tp2·pp2, to hf": ("classic", "back", lambda model: HfWriter(model, FILE_BYTES)),
}


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    gigabytes: Annotated[float, typer.Option(min=0.8, help="Size of the checkpoint.")] = 2.5,
    rounds: Annotated[int, typer.Option(min=1, help="Times everything is repeated; medians are reported.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Threads of a conversion.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where to write; default: the system's temporary folder.")] = None,
) -> None:
    """Convert a synthetic checkpoint both ways, against copying its files. Needs four times its size on the disk."""
    model = _model(gigabytes)
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if free < 4.5 * gigabytes * 1e9:
        raise UserError(f"--gigabytes {gigabytes:g}: needs {4.5 * gigabytes:.1f} GB on the disk, {free / 1e9:.1f} free")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rows, size = _measure(model, Path(place), rounds, workers)
    largest = max(_units(model), key=lambda unit: unit.nbytes).nbytes
    publish("conversion", rows, json, gigabytes=size / 1e9, largest_layer_mb=largest / 1e6, rounds=rounds)


def _measure(model: ModelShape, place: Path, rounds: int, workers: int) -> tuple[list[dict[str, Any]], int]:
    """The rows, and the bytes of the weights."""
    _write(model, place / "hf")
    size = sum(unit.nbytes for unit in _units(model))
    largest = max(unit.nbytes for unit in _units(model))
    copies: list[float] = []
    runs: dict[str, list[tuple[float, int, int]]] = {name: [] for name in DIRECTIONS}
    for _ in range(rounds):
        _cool(place)
        copies.append(_copy(place / "hf", place / "copied"))
        shutil.rmtree(place / "copied")
        for name, (source, destination, _writer) in DIRECTIONS.items():
            _cool(place)
            runs[name].append(_in_a_process(name, place / source, place / destination, workers))
            if destination == "back":
                shutil.rmtree(place / "back")
        for left in ("torch_dist", "classic"):
            shutil.rmtree(place / left)
    copy = statistics.median(copies)
    rows: list[dict[str, Any]] = [_row("copy and fsync", size, copies, copy)]
    for name, found in runs.items():
        base, peak = (statistics.median(run[i] for run in found) for i in (1, 2))
        memory = {"peak_rss_mb": peak / 1e6, "rss_before_mb": base / 1e6, "rise_in_layers": (peak - base) / largest}
        rows.append(_row(name, size, [run[0] for run in found], copy) | memory)
    return rows, size


def _row(name: str, size: int, seconds: list[float], copy: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    spread = {"seconds": median, "fastest": min(seconds), "slowest": max(seconds)}
    return {"what": name, **spread, "gb_per_s": size / 1e9 / median, "of_copy_speed": copy / median}


def _model(gigabytes: float) -> ModelShape:
    """With the even number of layers that comes nearest to the size."""
    one, two = (read_shape({**CONFIG, "num_hidden_layers": n}).parameters for n in (1, 2))
    pairs = round((gigabytes * 1e9 / 2 - one + (two - one)) / (two - one) / LAYOUT.pp)
    return read_shape({**CONFIG, "num_hidden_layers": LAYOUT.pp * max(1, pairs)})


def _units(model: ModelShape) -> list[Unit]:
    return units_of((rule for rule in rules(model) if not rule.copy), lambda rule: torch.bfloat16)


def _write(model: ModelShape, folder: Path) -> None:
    """A model folder of random weights, in files as on the hub."""
    folder.mkdir()
    (folder / "config.json").write_text(json_format.dumps({**CONFIG, "num_hidden_layers": model.layers}))
    units, writer = _units(model), HfWriter(model, FILE_BYTES)
    writer.lay_out(folder, units)
    for unit in units:
        writer.write(unit, ((rule, {p.name: _random(p.shape) for p in rule.parts}) for rule in unit.rules))
    writer.finish(units, {})
    writer.close()


def _random(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def _copy(source: Path, destination: Path) -> float:
    begun = time.perf_counter()
    shutil.copytree(source, destination)
    for file in destination.iterdir():
        with open(file, "rb") as copied:
            os.fsync(copied.fileno())
    return time.perf_counter() - begun


def _cool(place: Path) -> None:
    """Everything written back, and no file of `place` left in the page cache."""
    os.sync()
    for file in place.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_a_process(name: str, source: Path, destination: Path, workers: int) -> tuple[float, int, int]:
    """Seconds, and resident bytes before and at the peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_convert, (name, source, destination, workers))


def _convert(name: str, source: Path, destination: Path, workers: int) -> tuple[float, int, int]:
    writer = DIRECTIONS[name][2]
    before, begun = _peak_rss(), time.perf_counter()
    checkpoint = open_checkpoint(source)
    convert(plan(checkpoint, writer(checkpoint.model), destination), workers)
    checkpoint.close()
    return time.perf_counter() - begun, before, _peak_rss()


def _peak_rss() -> int:
    """The most resident memory this process ever had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
