"""Sequences → rows of at most `capacity` tokens, by Dense Prompt Packing or an alternative. Pure.

The packer sees lengths only, so it serves prompts and prompt+completion sequences. Rows are arrays of indices.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Literal

import numpy as np

from megarl.errors import UserError

Strategy = Literal["dense", "none", "sorted", "first_fit"]


def pack(
    lengths: np.ndarray | Sequence[int], capacity: int, strategy: Strategy = "dense", window: int = 256
) -> list[np.ndarray]:
    """Put every sequence into exactly one row of at most `capacity` tokens. Returns each row's indices, int64.

    `dense` is DPPO's window-based greedy packing (arXiv 2603.04135). A row takes the oldest of up to `window` pending
    sequences, then repeatedly the longest that still fits. When none fits, the row is closed and the window refilled.
    A sequence waits for at most `window` rows; a window of 1 packs nothing. `none`: one sequence a row.
    `sorted`: by decreasing length, the first that does not fit closes the row. `first_fit`: first-fit decreasing.
    Raises UserError when a sequence is longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if window < 1:
        raise UserError(f"packing.window: {window} leaves nothing to choose from; at least 1")
    if len(sizes) and sizes.max() > capacity:
        index = int(sizes.argmax())
        raise UserError(
            f"batch.tokens_per_row: {capacity} is shorter than sequence {index} of {sizes[index]} tokens; at least "
            f"{sizes[index]}"
        )
    if strategy == "none":
        rows = [[i] for i in range(len(sizes))]
    elif strategy == "dense":
        rows = _dense(sizes, capacity, window)
    else:
        order = np.argsort(-sizes, kind="stable").tolist()
        fill = {"sorted": _next_fit, "first_fit": first_fit}[strategy]
        rows = fill(order, sizes.tolist(), capacity)
    flat = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=len(sizes))
    ends = [0, *accumulate(map(len, rows))]
    return [flat[start:end] for start, end in pairwise(ends)]


def density(rows: Sequence[np.ndarray], lengths: np.ndarray | Sequence[int], capacity: int) -> float:
    """Valid tokens over the capacity of all rows. 1 without rows."""
    sizes = np.asarray(lengths)
    return sum(int(sizes[row].sum()) for row in rows) / (len(rows) * capacity) if rows else 1.0


def _dense(lengths: np.ndarray, capacity: int, window: int) -> list[list[int]]:
    n = len(lengths)
    # A pending sequence is one integer. They sort by length and, among equals, the oldest is last.
    keys = (lengths * n + np.arange(n - 1, -1, -1)).tolist()
    sizes = lengths.tolist()
    pending = sorted(keys[:window])
    arrived = len(pending)
    packed = bytearray(n)
    rows = []
    oldest = 0
    while pending:
        while packed[oldest]:
            oldest += 1
        at = bisect_left(pending, keys[oldest])
        row, room = [], capacity
        while at >= 0:
            i = n - 1 - pending.pop(at) % n
            packed[i] = 1
            row.append(i)
            room -= sizes[i]
            at = bisect_right(pending, room * n + n - 1) - 1  # the longest that fits, or -1
        rows.append(row)
        for key in keys[arrived : arrived + len(row)]:
            insort(pending, key)
        arrived += len(row)
    return rows


def _next_fit(order: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = -1
    for i in order:
        if sizes[i] > room:
            rows.append([])
            room = capacity
        rows[-1].append(i)
        room -= sizes[i]
    return rows


def first_fit(order: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Put each sequence, in the given order, into the first row with room, found by descending a tree of maxima."""
    leaves = 1 << max(len(order) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)  # room[1] is the root; the rows, most of them never opened, are the leaves
    rows: list[list[int]] = [[] for _ in range(len(order))]
    for i in order:
        size = sizes[i]
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        rows[node - leaves].append(i)
        room[node] -= size
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            room[node] = left if left > right else right
    return [row for row in rows if row]
