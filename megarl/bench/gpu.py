"""`megarl bench gpu`: on one CUDA device with Transformer Engine, compares the learner with itself and the planner."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from megarl import config
from megarl.bench.common import result
from megarl.bench.common.learners import samples, split
from megarl.bench.common.models import Sizes, write_model
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.planner.hardware import GIB, GPUS
from megarl.planner.job import software
from megarl.planner.layout import Layout
from megarl.planner.memory import plan_memory
from megarl.planner.steptime import step_time
from megarl.runtime import device
from megarl.runtime.spawn import spawn
from megarl.types import Batch, Sample
from megarl.view import table

TIMEOUT = 500.0  # seconds
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
STEPS = 50
SPEED_STEPS = 8
TOKENS = 8192  # of one row in the speed measurement
MEDIUM: Sizes = {  # about a billion parameters
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768, "initializer_range": 0.02,
    "max_position_embeddings": 16384,
}  # fmt: skip


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write them as a page, e.g. docs/gpu_results.md.")] = None,
) -> None:
    """Layer specs, packing, FP8 curves, speed and memory on one GPU."""
    rows = measure()
    result.publish("gpu", rows, json)
    if report:
        report.write_text(page(rows))


def measure() -> list[dict[str, Any]]:
    """One row per check: `check`, `variant` and its metrics. Raises UserError without a GPU or Transformer Engine."""
    if not device.transformer_engine():
        raise UserError("gpu: this benchmark needs a CUDA device and transformer-engine; run it where both are")
    with tempfile.TemporaryDirectory() as folder:
        small, medium = Path(folder, "small"), Path(folder, "medium")
        # Fused attention needs a head size of at least 64.
        write_model(small, hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
        write_model(medium, **MEDIUM)
        return [*gradients(small), *curves(small), *speed(medium)]


def gradients(folder: Path) -> list[dict[str, Any]]:
    """Transformer Engine's layers, packed, against Megatron's own and against one sequence per row, all in bf16."""
    base_loss, base = spawn(_gradients, 1, (folder, True, 3), TIMEOUT)[0]
    rows = []
    for variant, engine, size in (("local spec, packed", False, 3), ("TE spec, unpacked", True, 1)):
        loss, found = spawn(_gradients, 1, (folder, engine, size), TIMEOUT)[0]
        errors = [float((found[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in base.items()]
        rows.append(
            {
                "check": "gradients",
                "variant": variant,
                "dloss": abs(loss - base_loss) / abs(base_loss),
                "relgrad": statistics.median(errors),
                "worst_relgrad": max(errors),
            }
        )
    return rows


def curves(folder: Path) -> list[dict[str, Any]]:
    """Losses on a noisy chain with each FP8 recipe that this GPU supports, against bf16."""
    wanted = [{"dtype": "bf16"}]
    blackwell = torch.cuda.get_device_capability() >= (10, 0)
    wanted += [{"dtype": "fp8", "recipe": r} for r in RECIPES if blackwell == (r == "mxfp8") or r in RECIPES[:2]]
    ends = [statistics.mean(spawn(_losses, 1, (folder, precision), TIMEOUT)[0][-5:]) for precision in wanted]
    return [
        {"check": "curve", "variant": p.get("recipe", "bf16"), "loss": end, "against_bf16": end / ends[0] - 1}
        for p, end in zip(wanted, ends, strict=True)
    ]


def speed(folder: Path) -> list[dict[str, Any]]:
    """Tokens/s, MFU and peak memory of whole updates, with the planner's predictions."""
    shape = read_shape(folder)
    name = torch.cuda.get_device_name().lower()
    card = next((card for key, card in GPUS.items() if key.split("-")[0] in name), GPUS["h100"])
    rows = []
    for precision in ({"dtype": "bf16"}, {"dtype": "fp8", "recipe": "tensorwise"}):
        for recompute in ("none", "full"):
            parallel = {"recompute": recompute}
            seconds, peak = spawn(_speed, 1, (folder, precision, parallel), TIMEOUT)[0]
            chosen = _settings(folder, precision, parallel)
            layout = Layout(gpus=1, global_batch=4, sequence=TOKENS, attended=1024)
            stack = replace(software(chosen), dp_overlap=False)
            planned = step_time(shape, layout, stack, card)
            memory = plan_memory(shape, layout, stack)[0]
            rows.append(
                {
                    "check": "speed",
                    "variant": f"{precision['dtype']}, recompute {recompute}",
                    "tokens_per_second": 4 * TOKENS / seconds,
                    "mfu": planned.flops / seconds / card.peak("bf16"),
                    "seconds": seconds,
                    "planned_seconds": planned.seconds,
                    "peak_gib": peak / GIB,
                    "planned_gib": memory.allocated,
                }
            )
    return rows


def chain(step: int, tokens: int = 16) -> Batch:
    """Eight sequences of a noisy chain: the token after t is 5 t + 3 with probability 0.7, else any."""
    rng = np.random.default_rng(step)
    ids = rng.integers(0, tokens, (8, 65))
    for t in range(64):
        follow = rng.random(8) < 0.7
        ids[follow, t + 1] = (5 * ids[follow, t] + 3) % tokens
    return Batch([Sample(row.astype(np.int32), 1, 1 / 512) for row in ids], [[[0, 1, 2, 3], [4, 5, 6, 7]]], 8.0, 512.0)


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    machine = result.machine()
    lines = ["# Results on one GPU", "", f"Made by `make test-gpu` on {machine['gpu']}, torch {machine['torch']}.", ""]
    for check in dict.fromkeys(row["check"] for row in rows):
        chosen = [row for row in rows if row["check"] == check]
        names = [name for name in chosen[0] if name != "check"]
        lines += [f"## {check}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        lines += [f"| {' | '.join(table.cell(row[name]) for name in names)} |" for row in chosen] + [""]
    return "\n".join(lines)


def _settings(folder: Path, precision: dict[str, Any], parallel: dict[str, Any] | None = None) -> config.Settings:
    tree = {"run": folder / "run", "model": {"path": folder}, "data": {"train": []}, "parallel": parallel or {}}
    return config.parse({**tree, "precision": precision, "optimizer": {"lr": 2e-3}})


def _learner(chosen: config.Settings) -> Any:
    from megarl.learner.learner import Learner
    from megarl.learner.parallel import start

    world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
    return Learner(chosen, world, total_updates=1000)


def _gradients(folder: Path, engine: bool, size: int) -> tuple[float, dict[str, torch.Tensor]]:
    from megarl.learner.learner import sft_objective

    if not engine:
        device.transformer_engine = lambda: False  # type: ignore[assignment]  # this process has no other use
    learner = _learner(_settings(folder, {"dtype": "bf16"}))
    loss = learner.accumulate(split(samples(), 1, size), sft_objective)["loss"]
    return loss, {name: gradient.float().cpu().clone() for name, gradient in learner.named_gradients()}


def _losses(folder: Path, precision: dict[str, Any]) -> list[float]:
    from megarl.learner.learner import sft_objective

    learner = _learner(_settings(folder, precision))
    return [learner.train_step(chain(step), sft_objective)["loss"] for step in range(STEPS)]


def _speed(folder: Path, precision: dict[str, Any], parallel: dict[str, Any]) -> tuple[float, int]:
    """(median seconds of an update, peak bytes allocated)"""
    from megarl.learner.learner import sft_objective

    learner = _learner(_settings(folder, precision, parallel))
    rng = np.random.default_rng(0)
    each = 1025  # eight sequences of 1,024 inputs fill a row
    samples = [Sample(rng.integers(0, 32768, each).astype(np.int32), 1, 1e-4) for _ in range(4 * TOKENS // 1024)]
    rows = [[list(range(8 * i, 8 * i + 8)) for i in range(4)]]
    batch = Batch(samples, rows, len(samples), 1.0)
    times = []
    for step in range(SPEED_STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        learner.train_step(batch, sft_objective)
        torch.cuda.synchronize()
        if step > 1:
            times.append(time.perf_counter() - begin)
    return statistics.median(times), torch.cuda.max_memory_allocated()
