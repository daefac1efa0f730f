"""The slot table: the tokens of every slot of the KV cache, and how many of them are computed.

A slot's tokens lie in columns. The first `fed` are in the KV cache; `end` are known, as a token is sampled before it is
fed. A *branch* puts a probe's tokens behind the trunk that it forks from. It does not see the rest of the trunk: those
columns are its *gap*. When the branch is dropped, the trunk continues at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes: to `slot`, where its first `shared` tokens need no prefill."""

    slot: int
    shared: int
    source: int  # the slot to copy the shared tokens from; equal to `slot` when they are there
    branch: bool = False


class SlotTable:
    """Tokens and progress of every slot. The first index of all arrays is the slot; integers count columns."""

    def __init__(self, count: int, columns: int) -> None:
        self.count, self.columns = count, columns
        self.tokens = np.zeros((count, columns), np.int32)
        self.logprobs = np.zeros((count, columns), np.float32)
        self.active = np.zeros(count, bool)
        self.fed = np.zeros(count, np.int64)
        self.end = np.zeros(count, np.int64)
        self.start = np.zeros(count, np.int64)  # column of the first token that the running request sampled
        self.gap = np.zeros(count, np.int64)  # width of the branch's gap: position = column - gap
        self.trunk_fed = np.zeros(count, np.int64)
        self.trunk_end = np.zeros(count, np.int64)  # 0 = no branch
        self.reserved = np.full(count, -1, np.int64)  # steps for which an idle slot waits for a continuation; < 0: none
        self.completions: list[str | None] = [None] * count  # whose newest sequence a slot has, probes left out

    @property
    def width(self) -> int:
        """Number of slots up to the last active one."""
        return int(np.flatnonzero(self.active)[-1]) + 1

    def cached(self) -> np.ndarray:
        """How many tokens of its trunk each slot has in the KV cache, int64 [count]."""
        return np.where(self.trunk_end > 0, self.trunk_fed, self.fed)

    def unfed(self, slot: int | np.integer) -> np.ndarray:
        """The tokens to feed before the newest one, int32 [n]."""
        return self.tokens[slot, self.fed[slot] : self.end[slot] - 1]

    def gaps(self, slots: Sequence[int] | np.ndarray | slice) -> np.ndarray | None:
        """First column of each slot's gap and the one behind it, int64 [n, 2]; None if none of the slots has a
        branch."""
        end = self.trunk_end[slots]
        return np.stack([end - self.gap[slots], end], 1) if end.any() else None

    def enter(self, placement: Placement, token_ids: np.ndarray, completion: str | None) -> None:
        """Put a request's tokens, int32 [n], into its slot and make it active. `completion`: None for a probe."""
        slot, n, begin = placement.slot, placement.shared, placement.shared
        if placement.branch:
            self.trunk_fed[slot], self.trunk_end[slot] = self.fed[slot], self.end[slot]
            begin = int(self.end[slot])
            self.gap[slot] = begin - n
        else:
            self._assign(slot, completion)
        end = begin + len(token_ids) - n
        self.tokens[slot, begin:end] = token_ids[n:]
        if placement.source != slot:
            self.tokens[slot, :n] = token_ids[:n]
        self.fed[slot], self.start[slot], self.end[slot] = begin, end, end
        self.active[slot] = True

    def _assign(self, slot: int, completion: str | None) -> None:
        if completion in self.completions:
            self.completions[self.completions.index(completion)] = None
        self.completions[slot] = completion

    def append(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Add one sampled token to each of these slots, which have been fed all others."""
        end = self.end[slots]
        self.fed[slots] = end
        self.tokens[slots, end] = tokens
        self.logprobs[slots, end] = logprobs
        self.end[slots] += 1

    def leave(self, slot: int, reserve: int) -> None:
        """Make the slot idle, and reserve it for some steps. Its tokens stay for a continuation, a branch's do not."""
        self.active[slot], self.reserved[slot] = False, reserve
        if self.trunk_end[slot]:
            self.fed[slot], self.end[slot] = self.trunk_fed[slot], self.trunk_end[slot]
            self.gap[slot] = self.trunk_end[slot] = 0

    def forget(self, slot: int | np.ndarray) -> None:
        """Drop everything that an idle slot, or several, have cached."""
        self.fed[slot] = self.end[slot] = self.gap[slot] = self.trunk_end[slot] = 0
        self.reserved[slot] = -1

    def move(self, source: int, target: int) -> None:
        """Move an active slot's sequence to an idle slot."""
        columns = (self.fed, self.end, self.start, self.gap, self.trunk_fed, self.trunk_end)
        for array in (self.tokens, self.logprobs, *columns):
            array[target] = array[source]
        self.active[target], self.active[source] = True, False
        self._assign(target, self.completions[source])
        self.forget(source)

    def detach_branch(self, slot: int) -> None:
        """Make a branch the slot's only sequence: its tokens close the gap. The rest of the trunk is lost."""
        trunk, gap, end = int(self.trunk_end[slot]), int(self.gap[slot]), int(self.end[slot])
        if trunk:
            for array in (self.tokens, self.logprobs):
                array[slot, trunk - gap : end - gap] = array[slot, trunk:end].copy()
            for column in (self.fed, self.end, self.start):
                column[slot] -= gap
            self.gap[slot] = self.trunk_end[slot] = 0
