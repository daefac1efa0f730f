"""Rows → data-parallel ranks: the same number of micro-batches on each rank, and nearly the same work. Pure functions.

A sequence of n tokens costs `token * n + square * n**2`, so batches with equal tokens may differ in attention. Rows
start as packing made them. Sequences move between rows only to balance the ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from megarl.errors import UserError
from megarl.models.shape import ModelShape

GOOD_ENOUGH = 1.001  # max / mean cost at which balancing stops
MAX_PAIRS = 1 << 20  # pairs of sequences compared for one exchange


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of a sequence of n tokens, in any unit: `token * n + square * n**2`."""

    token: float = 1.0
    square: float = 0.0

    def __call__(self, lengths: np.ndarray | Sequence[int]) -> np.ndarray:
        sizes = np.asarray(lengths, dtype=np.float64)
        return self.token * sizes + self.square * sizes**2

    @classmethod
    def of_model(cls, shape: ModelShape) -> Self:
        """The cost of a model's forward pass, in multiply-adds.

        Each token meets every active weight once. Causal attention adds n**2 / 2 scores and as many weighted values
        in each layer, over all heads.
        """
        square = shape.layers * (shape.query_width + shape.value_width) / 2
        return cls(float(shape.active_parameters()), float(square))


def balance(
    rows: Sequence[np.ndarray],
    lengths: np.ndarray | Sequence[int],
    dp_size: int,
    cost: Cost,
    capacity: int,
    multiple_of: int = 1,
) -> list[list[np.ndarray]]:
    """Assign rows to ranks: `result[rank]` lists its rows, the costliest first, the same number on every rank.

    The number of rows per rank is a multiple of `multiple_of`, which the pipeline schedule may need. Missing rows come
    from splitting the costliest ones, so that every micro-batch has work. Empty rows are added only when no row has two
    sequences. No row exceeds `capacity`; every sequence is in exactly one row. Deterministic.
    """
    if dp_size < 1 or multiple_of < 1:
        raise UserError(f"balance: {dp_size} ranks and a multiple of {multiple_of} rows; both must be at least 1")
    sizes = np.asarray(lengths, dtype=np.int64)
    costs = cost(sizes)
    per_rank = -(-len(rows) // (dp_size * multiple_of)) * multiple_of
    split = _split([row.tolist() for row in rows], costs, dp_size * per_rank)
    ranks = _deal(split, costs, dp_size, per_rank)
    _even_out(ranks, sizes, costs, capacity)
    for rank in ranks:
        rank.rows.sort(key=lambda row: -costs[row].sum())
    return [[np.array(row, dtype=np.int64) for row in rank.rows] for rank in ranks]


def imbalance(ranks: Sequence[Sequence[np.ndarray]], lengths: np.ndarray | Sequence[int], cost: Cost = Cost()) -> float:
    """Cost of the busiest rank divided by the mean; 1 is perfect balance."""
    costs = cost(lengths)
    totals = [sum(costs[row].sum() for row in rows) for rows in ranks]
    return float(max(totals) / np.mean(totals)) if sum(totals) else 1.0


@dataclass(slots=True)
class _Rank:
    rows: list[list[int]] = field(default_factory=list)
    cost: float = 0.0


def _split(rows: list[list[int]], costs: np.ndarray, wanted: int) -> list[list[int]]:
    """Halve the costliest row of several sequences until there are `wanted` rows, then add empty ones."""
    heap = [(-float(costs[row].sum()), n, row) for n, row in enumerate(rows) if len(row) > 1]
    done = [row for row in rows if len(row) < 2]
    heapq.heapify(heap)
    while heap and len(heap) + len(done) < wanted:
        _, _, row = heapq.heappop(heap)
        halves: tuple[list[int], list[int]] = ([], [])
        sums = [0.0, 0.0]
        for i in sorted(row, key=lambda i: -costs[i]):
            lighter = int(sums[1] < sums[0])
            halves[lighter].append(i)
            sums[lighter] += float(costs[i])
        for half, total in zip(halves, sums, strict=True):
            if len(half) > 1:
                heapq.heappush(heap, (-total, half[0] + len(rows), half))
            else:
                done.append(half)
    done += [row for _, _, row in sorted(heap)]
    return done + [[] for _ in range(wanted - len(done))]


def _deal(rows: list[list[int]], costs: np.ndarray, dp_size: int, per_rank: int) -> list[_Rank]:
    """Longest processing time first, with `per_rank` rows for each rank."""
    ranks = [_Rank() for _ in range(dp_size)]
    heap = [(0.0, r) for r in range(dp_size)]
    for total, row in sorted(((float(costs[row].sum()), row) for row in rows), key=lambda pair: -pair[0]):
        _, r = heapq.heappop(heap)
        ranks[r].rows.append(row)
        ranks[r].cost += total
        if len(ranks[r].rows) < per_rank:
            heapq.heappush(heap, (ranks[r].cost, r))
    return ranks


def _even_out(ranks: list[_Rank], sizes: np.ndarray, costs: np.ndarray, capacity: int) -> None:
    """Exchange sequences between the busiest rank and another while that makes the busiest less busy."""
    mean = sum(rank.cost for rank in ranks) / len(ranks)
    for _ in range(64 * len(ranks)):  # a limit; a few rounds are usually enough
        busiest = max(ranks, key=lambda rank: rank.cost)
        if busiest.cost <= GOOD_ENOUGH * mean:
            return
        others = sorted((rank for rank in ranks if rank is not busiest), key=lambda rank: rank.cost)
        if not any(_exchange(busiest, other, sizes, costs, capacity) for other in others) and not any(
            _exchange_rows(busiest, other, costs) for other in others
        ):
            return


def _exchange(high: _Rank, low: _Rank, sizes: np.ndarray, costs: np.ndarray, capacity: int) -> bool:
    """Move one sequence from `high` to `low`, or exchange two: whichever balances them best."""
    gap = high.cost - low.cost
    if gap <= 0:
        return False
    i, i_row, i_room = _sequences(high, sizes, capacity)
    j, j_row, j_room = _sequences(low, sizes, capacity)
    # A free place in a row of `low`: no sequence comes back, index -1, length and cost 0.
    j, j_row, j_room = np.hstack([[j, j_row, j_room], _place(low, sizes, capacity)])
    i_size, i_cost = sizes[i][:, None], costs[i][:, None]
    j_size, j_cost = np.where(j >= 0, sizes[j], 0), np.where(j >= 0, costs[j], 0.0)
    shifted = i_cost - j_cost
    fits = (i_size - j_size <= j_room) & (j_size - i_size <= i_room[:, None])
    off = np.where(fits & (shifted > 1e-9 * gap) & (shifted < (1 - 1e-9) * gap), np.abs(shifted - gap / 2), np.inf)
    a, b = np.unravel_index(int(np.argmin(off)), off.shape)
    if not np.isfinite(off[a, b]):
        return False
    high.rows[i_row[a]].remove(i[a])
    low.rows[j_row[b]].append(int(i[a]))
    if j[b] >= 0:
        low.rows[j_row[b]].remove(j[b])
        high.rows[i_row[a]].append(int(j[b]))
    high.cost -= float(shifted[a, b])
    low.cost += float(shifted[a, b])
    return True


def _exchange_rows(high: _Rank, low: _Rank, costs: np.ndarray) -> bool:
    """Exchange two whole rows, for when no row has room to exchange sequences."""
    gap = high.cost - low.cost
    ours, theirs = (np.array([costs[row].sum() for row in rank.rows]) for rank in (high, low))
    shifted = ours[:, None] - theirs
    off = np.where((shifted > 1e-9 * gap) & (shifted < (1 - 1e-9) * gap), np.abs(shifted - gap / 2), np.inf)
    a, b = np.unravel_index(int(np.argmin(off)), off.shape)
    if not np.isfinite(off[a, b]):
        return False
    high.rows[a], low.rows[b] = low.rows[b], high.rows[a]
    high.cost -= float(shifted[a, b])
    low.cost += float(shifted[a, b])
    return True


def _sequences(rank: _Rank, sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rank's sequences, their rows, and the room in those rows. Very many are thinned out evenly."""
    index = np.array([i for row in rank.rows for i in row], dtype=np.int64)
    row = np.repeat(np.arange(len(rank.rows)), [len(row) for row in rank.rows])
    room = np.array([capacity - sizes[row].sum() for row in rank.rows])[row]
    step = max(1, -(-len(index) // int(MAX_PAIRS**0.5)))
    return index[::step], row[::step], room[::step]


def _place(rank: _Rank, sizes: np.ndarray, capacity: int) -> np.ndarray:
    """A free place in the rank's emptiest row, as a column (-1, row, room)."""
    rooms = [capacity - int(sizes[row].sum()) for row in rank.rows]
    emptiest = int(np.argmax(rooms))
    return np.array([[-1], [emptiest], [rooms[emptiest]]])
