"""Useful tokens per second of a training step at tp1, against plain transformers + torch.optim.AdamW.

Both train the same float32 model on the same sequences in one process: forward, loss, backward, clipping, update.
`packed` work is rows of up to 1,024 tokens, made by the learner's packing. transformers gets the same rows with
position ids that restart, which is its form of packing. `padded` work is micro-batches in which each sequence is padded
to the longest of all. The learner gets the padding as sequences that train nothing. Useful tokens are those of prompts
and responses. The losses of all first steps must be equal, so both compute the same.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

from megarl.bench.common import result
from megarl.bench.common.learners import settings
from megarl.bench.common.models import Sizes, write_model
from megarl.config import Settings
from megarl.data.packing import pack
from megarl.runtime.spawn import spawn
from megarl.types import Batch, Sample

TIMEOUT = 3600.0
SIZES: Sizes = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32,
    "initializer_range": 0.02,
}  # fmt: skip
ROOM = 1024  # tokens per row or padded micro-batch
LEARNING_RATE = 1e-4
PROMPT = 24

Rows = list[list[Sample]]
Step = Callable[[], float]  # one training step; returns its loss


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of a step.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed steps of each trainer and kind of work.")] = 5,
) -> None:
    """Median useful tokens per second, their spread, and the ratios to transformers and of packed to padded work.

    Ratios are medians over the repeats. `cpu_ratio` is the ratio of processor time, for machines that are busy.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), tied=True, **SIZES)
        rows = spawn(_measure, 1, (Path(folder), sequences, repeats), TIMEOUT)[0]
    result.publish("learner", rows, json, threads=torch.get_num_threads(), sequences=sequences, room=ROOM)


def draw(count: int, seed: int = 0) -> list[Sample]:
    """Prompts of 24 tokens; responses log-normal around 110 tokens, from 16 to 480; each with its own weight."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(110), 0.8, count), 16, 480).astype(int)
    ids = [rng.integers(0, SIZES["vocab_size"], PROMPT + n).astype(np.int32) for n in lengths]
    return [Sample(tokens, PROMPT, float(rng.uniform(0.5, 1.5)) / lengths.sum()) for tokens in ids]


def packed(samples: list[Sample]) -> Rows:
    return [[samples[i] for i in row] for row in pack([s.input_length for s in samples], ROOM)]


def padded(samples: list[Sample]) -> Rows:
    """Micro-batches in the order given, of as many samples as fit if each has the length of the longest."""
    size = ROOM // max(s.input_length for s in samples)
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def _measure(folder: Path, count: int, repeats: int) -> list[dict[str, Any]]:
    from megarl.learner.parallel import start

    chosen = settings(folder, {}, optimizer={"lr": LEARNING_RATE, "decay": "constant"})
    world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
    samples = draw(count)
    tokens = sum(s.input_length for s in samples)
    ways: dict[tuple[str, str], Step] = {
        ("megarl", "packed"): _megarl(chosen, world, packed(samples)),
        ("transformers", "packed"): _transformers(folder, [_as_row(row) for row in packed(samples)]),
        ("megarl", "padded"): _megarl(chosen, world, [filled(row) for row in padded(samples)]),
        ("transformers", "padded"): _transformers(folder, [_as_matrix(row) for row in padded(samples)]),
    }
    losses = {way: step() for way, step in ways.items()}  # also warms the caches
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise AssertionError(f"the trainers do not compute the same: {losses}")
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    cpu: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in ways if repeat % 2 else reversed(ways):
            begun, cpu_begun = time.perf_counter(), time.process_time()
            ways[way]()
            seconds[way].append(time.perf_counter() - begun)
            cpu[way].append(time.process_time() - cpu_begun)
    return [
        {
            "trainer": trainer,
            "work": work,
            "tokens": tokens,
            "tokens_per_s": tokens / statistics.median(taken),
            "slowest": tokens / max(taken),
            "fastest": tokens / min(taken),
            "ratio": _ratio(seconds["transformers", work], taken),
            "cpu_ratio": _ratio(cpu["transformers", work], cpu[trainer, work]),
            "over_padded": _ratio(seconds[trainer, "padded"], taken),
            "cpu_over_padded": _ratio(cpu[trainer, "padded"], cpu[trainer, work]),
            "first_loss": losses[trainer, work],
        }
        for (trainer, work), taken in seconds.items()
    ]


def _ratio(reference: list[float], taken: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(reference, taken, strict=True))


# The learner


def _megarl(chosen: Settings, world: Any, rows: Rows) -> Step:
    from megarl.learner.learner import Learner, sft_objective

    learner = Learner(chosen, world, total_updates=10**6)
    samples = [sample for row in rows for sample in row]
    numbers = iter(range(len(samples)))
    batch = Batch(samples, [[[next(numbers) for _ in row] for row in rows]], len(samples), 1.0)
    return lambda: learner.train_step(batch, sft_objective)["loss"]


def filled(row: list[Sample]) -> list[Sample]:
    """Each sequence followed by one that trains nothing and fills it up to the micro-batch's longest."""
    longest = max(s.input_length for s in row)
    found = []
    for sample in row:
        found.append(sample)
        if missing := longest - sample.input_length:
            found.append(Sample(np.zeros(missing + 1, np.int32), missing + 1, 0.0))
    return found


# transformers


def _transformers(folder: Path, batches: list[dict[str, torch.Tensor]]) -> Step:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            logits = model(
                input_ids=batch["tokens"],
                attention_mask=batch.get("mask"),
                position_ids=batch.get("positions"),
                use_cache=False,
            ).logits
            nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            loss = (nll * batch["scale"].flatten()).sum()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def _columns(sample: Sample) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(sample.token_ids).long()
    scale = torch.zeros(sample.input_length)
    scale[sample.response_start - 1 :] = sample.scale
    return {"tokens": ids[:-1], "labels": ids[1:], "scale": scale, "positions": torch.arange(sample.input_length)}


def _as_row(row: list[Sample]) -> dict[str, torch.Tensor]:
    """One row, [1, t]; transformers finds where a sequence begins from the positions."""
    parts = [_columns(sample) for sample in row]
    return {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}


def _as_matrix(row: list[Sample]) -> dict[str, torch.Tensor]:
    """One micro-batch, [sequences, longest], padded at the right."""
    parts = [_columns(sample) for sample in row]

    def stacked(tensors: Iterator[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)

    columns = {name: stacked(part[name] for part in parts) for name in ("tokens", "labels", "scale")}
    return {**columns, "mask": stacked(torch.ones_like(part["tokens"]) for part in parts)}
