"""The planner's peak memory of CPU ranks against what the operating system measured.

A small model makes two updates in float32 under several layouts. Measured is the peak of a rank's resident memory minus
its value before the learner was built. Planned is the sum of the planner's parts for that rank's pipeline stage.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from megarl.bench.common import result
from megarl.bench.common.choice import chosen
from megarl.bench.common.learners import settings
from megarl.bench.common.models import Sizes, write_model
from megarl.config import Parallel
from megarl.models.config_json import read_shape
from megarl.planner.job import recomputed
from megarl.planner.layout import Layout, Software
from megarl.planner.memory import plan_memory
from megarl.runtime.spawn import spawn
from megarl.types import Batch, Sample

TIMEOUT = 400.0
TOKENS = 1024  # of a row
ROWS = 2  # per data-parallel rank
UPDATES = 2  # the first makes the optimizer's state
MODEL: Sizes = {
    **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "head_dim": 32, "vocab_size": 4096},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp1 full recompute": (1, {"recompute": "full"}),
    "tp2": (2, {"tp": 2, "sequence_parallel": False}),
    "tp2+sp": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {"distributed_optimizer": False}),
    "dp2 distributed optimizer": (2, {}),
    "tp2·pp2+sp": (4, {"tp": 2, "pp": 2}),
}
MIB = 2**20
MMAP_THRESHOLD = -3  # mallopt's M_MMAP_THRESHOLD


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Only this layout; may be given again.")] = None,
) -> None:
    """Peak memory of CPU ranks, planned and measured, layout by layout."""
    rows = compare(chosen(layout or LAYOUTS, LAYOUTS, "layout"))
    worst = max(abs(row["error"]) for row in rows)
    result.publish("memory", rows, json, summary={"worst_error": worst})
    print(f"worst error: {worst:.1%}")


def compare(layouts: list[str]) -> list[dict[str, Any]]:
    """One row per layout and pipeline stage: MiB planned, MiB measured on the fullest rank, and the relative error."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, **MODEL)
        for layout in layouts:
            ranks, sizes_ = LAYOUTS[layout]
            wanted = planned(folder, Parallel(**sizes_), ranks)
            found: dict[int, float] = {}
            for stage, peak in spawn(_measure, ranks, (folder, sizes_), TIMEOUT):
                found[stage] = max(found.get(stage, 0.0), peak)
            for stage, peak in sorted(found.items()):
                sizes_mib = {"planned_mib": wanted[stage], "measured_mib": peak}
                rows.append({"layout": layout, "stage": stage, **sizes_mib, "error": wanted[stage] / peak - 1})
    return rows


def planned(folder: Path, parallel: Parallel, ranks: int) -> list[float]:
    """MiB of each stage."""
    layout = Layout(
        gpus=ranks,
        tp=parallel.tp,
        pp=parallel.pp,
        sequence=TOKENS,
        global_batch=ROWS * ranks // parallel.model_ranks,
    )
    software = Software(
        dtype="fp32",
        sequence_parallel=parallel.uses_sequence_parallel,
        distributed_optimizer=parallel.distributed_optimizer,
        recompute=recomputed(parallel),
        chunked_loss=True,
        cpu=True,
    )
    return [sum(stage.parts.values()) / MIB for stage in plan_memory(read_shape(folder), layout, software)]


def _measure(folder: Path, parallel: dict[str, Any]) -> tuple[int, float]:
    """Runs on every rank; returns its pipeline stage and the most MiB that its resident memory grew by."""
    from megarl.learner.learner import Learner, sft_objective
    from megarl.learner.parallel import start

    # Larger blocks return to the system at once; by default glibc's bound grows with use.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)
    chosen = settings(folder, parallel)
    world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = _status("VmRSS")
    learner = Learner(chosen, world, total_updates=UPDATES)
    for batch in _batches(world.dp_size):
        learner.train_step(batch if world.is_controller else None, sft_objective)
    peak = _status("VmHWM") - before
    stage = world.pp_rank
    world.release()
    return stage, peak


def _batches(replicas: int) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    count = replicas * ROWS
    for _ in range(UPDATES):
        tokens = rng.integers(0, MODEL["vocab_size"], (count, TOKENS + 1)).astype(np.int32)
        samples = [Sample(row, 1, scale=1.0 / tokens.size) for row in tokens]
        rows = [[[i] for i in range(rank, count, replicas)] for rank in range(replicas)]
        yield Batch(samples, rows, float(count), float(tokens.size))


def _status(name: str) -> float:
    """The MiB that the system reports for this process under `name`."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) / 1024
