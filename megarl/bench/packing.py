"""Density and time of every packing strategy against peers' rules, and the balance over ranks.

Lengths have two distributions that rollouts have: log-normal, and bimodal (short answers beside long thoughts, cut off
at the row's capacity). `density` gives every row the size of the method's longest, so a rule that exceeds the token
budget pays for the memory it takes. `density_of_budget` is tokens over capacity, exceeded or not. `density_by_step` is
`density` when 1,024 sequences are packed at a time, as in a training step. Everything runs on one core. Where
`cpu_seconds` is far below `seconds`, the machine was busy with something else.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from megarl.bench.common.result import publish
from megarl.data.balance import Cost, balance, imbalance
from megarl.data.packing import density, first_fit, pack
from megarl.models.shape import ModelShape

STEP = 1024  # sequences per training step
Rows = list[np.ndarray]

# For the ratio of attention to the rest.
QWEN3_8B = Cost.of_model(
    ModelShape(layers=36, hidden=4096, heads=32, kv_groups=8, head_dim=128, ffn=12288, vocab=151936)
)


def main(
    json: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
    sequences: Annotated[int, typer.Option(min=STEP, help="Sequences to pack.")] = 100_000,
    capacity: Annotated[int, typer.Option(help="Tokens per row.")] = 16_384,
    window: Annotated[int, typer.Option(help="Pending sequences that dense packing looks at.")] = 256,
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the lengths.")] = 0,
) -> None:
    """Pack the same lengths by every method, then deal dense rows to data-parallel ranks at several batch sizes."""
    results: list[dict[str, Any]] = []
    for distribution, draw in DISTRIBUTIONS.items():
        lengths = draw(np.random.default_rng(seed), sequences, capacity)
        for method, packer in _methods(capacity, window).items():
            results.append({"method": method, "distribution": distribution, **_pack(packer, lengths, capacity)})
        for count in (128, STEP, sequences):
            results.append(
                {"method": "balance", "distribution": distribution, **_balance(lengths, count, capacity, window, ranks)}
            )
    publish("packing", results, json, sequences=sequences, capacity=capacity, window=window, ranks=ranks, seed=seed)


# Lengths


def log_normal(rng: np.random.Generator, n: int, capacity: int) -> np.ndarray:
    """Median 2,500 tokens of 16,384, sigma 0.8."""
    return _whole(rng.lognormal(np.log(0.15 * capacity), 0.8, n), capacity)


def bimodal(rng: np.random.Generator, n: int, capacity: int) -> np.ndarray:
    """70% around 1,200 tokens of 16,384; the others around 9,000, some of which reach the limit."""
    short, long = rng.lognormal(np.log(0.073 * capacity), 0.5, n), rng.lognormal(np.log(0.55 * capacity), 0.35, n)
    return _whole(np.where(rng.random(n) < 0.7, short, long), capacity)


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "log_normal": log_normal,
    "bimodal": bimodal,
}


def _whole(lengths: np.ndarray, capacity: int) -> np.ndarray:
    return np.clip(lengths, 1, capacity).astype(np.int64)


# Methods


def _methods(capacity: int, window: int) -> dict[str, Callable[[np.ndarray], Rows]]:
    return {
        "dense": lambda lengths: pack(lengths, capacity, "dense", window),
        "none": lambda lengths: pack(lengths, capacity, "none"),
        "sorted": lambda lengths: pack(lengths, capacity, "sorted"),
        "first_fit_decreasing": lambda lengths: pack(lengths, capacity, "first_fit"),
        "first_fit_arrival": lambda lengths: first_fit_arrival(lengths, capacity),
        "verl_dynamic": lambda lengths: by_step(lengths, lambda part: verl_dynamic(part, capacity)),
    }


def first_fit_arrival(lengths: np.ndarray, capacity: int) -> Rows:
    """First fit by token budget in order of arrival; every row stays open to the end."""
    return [np.array(row) for row in first_fit(list(range(len(lengths))), lengths.tolist(), capacity)]


def verl_dynamic(lengths: np.ndarray, capacity: int) -> Rows:
    """verl's dynamic batching: ceil(tokens / budget) micro-batches of balanced sums, by largest differencing.

    The budget sets the number of micro-batches; a single one may exceed it.
    """
    return largest_differencing(lengths, -(-int(lengths.sum()) // capacity))


def largest_differencing(lengths: np.ndarray, k: int) -> Rows:
    """Partition into k sets of nearly equal sums (Karmarkar and Karp, 1982).

    A candidate has k sums in decreasing order and the names of the k sets. A name is a sequence's index, -1 for the
    empty set, or what `unions` calls the union of two others. The two candidates of largest spread are merged, the
    largest set of one with the smallest of the other, until one is left.
    """
    unions: list[tuple[int, int]] = []
    heap = []
    for i, size in enumerate(lengths.tolist()):
        sums, sets = np.zeros(k, dtype=np.int64), np.full(k, -1)
        sums[0], sets[0] = size, i
        heap.append((-size, i, sums, sets))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, i, sums, sets = heapq.heappop(heap)
        _, _, other_sums, other_sets = heapq.heappop(heap)
        other_sets = other_sets[::-1]
        sums = sums + other_sums[::-1]
        both = np.flatnonzero((sets >= 0) & (other_sets >= 0))
        merged = np.maximum(sets, other_sets)
        merged[both] = len(lengths) + len(unions) + np.arange(len(both))
        unions += zip(sets[both].tolist(), other_sets[both].tolist(), strict=True)
        order = np.argsort(-sums, kind="stable")
        heapq.heappush(heap, (int(sums[order[-1]] - sums[order[0]]), i, sums[order], merged[order]))
    partition = []
    for name in heap[0][3].tolist():
        row, unseen = [], [name]
        while unseen:
            name = unseen.pop()
            if name >= len(lengths):
                unseen += unions[name - len(lengths)]
            elif name >= 0:
                row.append(name)
        partition.append(np.array(row, dtype=np.int64))
    return partition


def by_step(lengths: np.ndarray, packer: Callable[[np.ndarray], Rows]) -> Rows:
    """Pack `STEP` sequences at a time."""
    starts = range(0, len(lengths), STEP)
    return [start + row for start in starts for row in packer(lengths[start : start + STEP])]


# Measuring


def _pack(packer: Callable[[np.ndarray], Rows], lengths: np.ndarray, capacity: int) -> dict[str, Any]:
    seconds, cpu_seconds = [], []
    for _ in range(3):
        start, cpu_start = time.perf_counter(), time.process_time()
        rows = packer(lengths)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    stepwise = by_step(lengths, packer)
    return {
        "density": _density(rows, lengths, capacity),
        "density_of_budget": density(rows, lengths, capacity),
        "density_by_step": _density(stepwise, lengths, capacity),
        "rows": len(rows),
        "longest_row": _longest(rows, lengths),
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
    }


def _density(rows: Rows, lengths: np.ndarray, capacity: int) -> float:
    return float(lengths.sum() / (len(rows) * max(capacity, _longest(rows, lengths))))


def _longest(rows: Rows, lengths: np.ndarray) -> int:
    return max(int(lengths[row].sum()) for row in rows)


def _balance(lengths: np.ndarray, count: int, capacity: int, window: int, ranks: int) -> dict[str, Any]:
    """The worst imbalance over up to 20 batches of `count` sequences, and the median time to deal one."""
    worst, seconds = 1.0, []
    for start in range(0, min(20 * count, len(lengths) - count + 1), count):
        batch = lengths[start : start + count]
        rows = pack(batch, capacity, "dense", window)
        begun = time.perf_counter()
        dealt = balance(rows, batch, ranks, QWEN3_8B, capacity)
        seconds.append(time.perf_counter() - begun)
        worst = max(worst, imbalance(dealt, batch, QWEN3_8B))
    return {"sequences": count, "dp_imbalance": worst, "seconds": statistics.median(seconds)}
