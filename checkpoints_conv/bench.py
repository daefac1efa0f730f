"""Compares converting a multi-GB checkpoint with copying its files on the same disk, from cold caches; and peak memory.

The model is random, with Qwen3-1.7B's sizes and enough layers to fill `gigabytes`. Every round runs each conversion in
a separate process, timed from opening the source to the destination's final name, without Python's start. Right before
each it copies the Hugging Face files, so both see the same machine. Conversion and copy end with the same fsync of
every file and folder. Before each, all data is written back and every file is dropped from the page cache. Caches
inside the disk, or under a virtual one, are not cleared.

`of_copy_speed` is the copy's seconds divided by the conversion's, median over the rounds. Every row copies Hugging Face
files. Classic files contain tied embeddings twice, on the first and the last pipeline stage: see `written_gb`.
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
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from checkpoints_conv.classic import ClassicWriter
from checkpoints_conv.convert import convert, plan, sync
from checkpoints_conv.formats import open_checkpoint
from checkpoints_conv.hf_writer import HfWriter
from checkpoints_conv.torch_dist import TorchDistWriter
from checkpoints_conv.unit import Unit, Writer, units_of
from megarl.bench.common.result import publish
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.layout import Layout
from megarl.models.shape import ModelShape

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "rope_theta": 1e6, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip
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
    gigabytes: Annotated[
        float, typer.Option(min=0.001, help="Size of the checkpoint; at least two layers, 0.8 GB.")
    ] = 2.5,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; the result is the median.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Threads of a conversion.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where to write; default: the system's temporary folder.")] = None,
) -> None:
    """Convert a random checkpoint both ways and compare with copying it. Needs four times its size on the disk."""
    model = _model(gigabytes)
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if free < 4.5 * gigabytes * 1e9:
        raise UserError(f"--gigabytes {gigabytes:g}: needs {4.5 * gigabytes:.1f} GB on the disk, {free / 1e9:.1f} free")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        rows, size = _measure(model, Path(place), rounds, workers)
    largest = max(_units(model), key=lambda unit: unit.nbytes).nbytes
    publish("conversion", rows, json, gigabytes=size / 1e9, largest_layer_mb=largest / 1e6, rounds=rounds)


class Run(NamedTuple):
    """Measurements of one conversion or one copy."""

    seconds: float
    cpu_seconds: float  # of all threads, including the kernel's work for them
    written: int  # bytes
    rss_before: int  # bytes
    rss_peak: int


def _measure(model: ModelShape, place: Path, rounds: int, workers: int) -> tuple[list[dict[str, Any]], int]:
    """The rows, and the bytes of the weights."""
    _write(model, place / "hf")
    size = sum(unit.nbytes for unit in _units(model))
    largest = max(unit.nbytes for unit in _units(model))
    pairs: dict[str, list[tuple[Run, Run]]] = {name: [] for name in DIRECTIONS}
    for _ in range(rounds):
        for name, (source, destination, _writer) in DIRECTIONS.items():
            _cool(place)
            copy = _in_a_process(_copy, place / "hf", place / "copied")
            shutil.rmtree(place / "copied")
            _cool(place)
            pairs[name].append((copy, _in_a_process(_convert, place / source, place / destination, name, workers)))
            if destination == "back":
                shutil.rmtree(place / "back")
        for left in ("torch_dist", "classic"):
            shutil.rmtree(place / left)
    rows = [
        _row("copy and fsync", size, [copy for found in pairs.values() for copy, _ in found]) | {"of_copy_speed": 1.0}
    ]
    for name, found in pairs.items():
        runs = [run for _, run in found]
        base, peak = (
            statistics.median(rss) for rss in ([run.rss_before for run in runs], [run.rss_peak for run in runs])
        )
        of_copy = {"of_copy_speed": statistics.median(copy.seconds / run.seconds for copy, run in found)}
        memory = {"peak_rss_mb": peak / 1e6, "rss_before_mb": base / 1e6, "rise_in_layers": (peak - base) / largest}
        rows.append(_row(name, size, runs) | of_copy | memory)
    return rows, size


def _row(name: str, size: int, runs: list[Run]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs]
    median = statistics.median(seconds)
    spread = {"seconds": median, "fastest": min(seconds), "slowest": max(seconds)}
    work = {"cpu_seconds": statistics.median(run.cpu_seconds for run in runs), "written_gb": runs[0].written / 1e9}
    return {"what": name, **spread, "gb_per_s": size / 1e9 / median, **work}


def _model(gigabytes: float) -> ModelShape:
    """The model with the even number of layers nearest to the size."""
    one, two = (read_shape({**CONFIG, "num_hidden_layers": n}).parameters() for n in (1, 2))
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


def _copy(source: Path, destination: Path) -> None:
    shutil.copytree(source, destination)
    sync(destination)


def _convert(source: Path, destination: Path, name: str, workers: int) -> None:
    checkpoint = open_checkpoint(source)
    convert(plan(checkpoint, DIRECTIONS[name][2](checkpoint.model), destination), workers)


def _cool(place: Path) -> None:
    """Write everything back, and drop the files of `place` from the page cache."""
    os.sync()
    for file in place.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_a_process(work: Callable[..., None], source: Path, destination: Path, *options: Any) -> Run:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (work, source, destination, *options))


def _run(work: Callable[..., None], source: Path, destination: Path, *options: Any) -> Run:
    before, cpu, begun = _peak_rss(), time.process_time(), time.perf_counter()
    work(source, destination, *options)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    written = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    return Run(seconds, cpu, written, before, _peak_rss())


def _peak_rss() -> int:
    """Peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
