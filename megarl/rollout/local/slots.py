"""The host's view of the decoder's slots: which tokens each holds, and which slot a request should take.

A slot's tokens lie in columns; `fed` of them are in the KV cache, `end` are known (the newest sampled token is known
before it is fed). A *branch* holds the tokens of a probe behind the trunk it forked from: the trunk's remainder stays
in a gap that the branch does not see, so that going on with the trunk afterwards costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_REWIND = 64  # an idle slot is rewound, and not copied, when that loses at most so many tokens
_RECENT = 2  # ticks within which a finished request's sequence is expected to be continued
_HELD = 64  # the same at a stop word, where it may have to wait for a probe
_NEARLY = 8  # a cache that lacks at most so many of a request's tokens is taken without looking for a better one


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes: `slot`, of whose cache the first `shared` tokens are its own."""

    slot: int
    shared: int
    source: int  # the slot to copy the shared tokens from; equal to `slot` when they are there
    branch: bool = False


class Slots:
    """Tokens and progress of every slot; arrays are indexed by slot, integer ones count columns."""

    def __init__(self, count: int, columns: int) -> None:
        self.count, self.columns = count, columns
        self.tokens = np.zeros((count, columns), np.int32)
        self.logprobs = np.zeros((count, columns), np.float32)
        self.fed = np.zeros(count, np.int64)
        self.end = np.zeros(count, np.int64)
        self.gap = np.zeros(count, np.int64)  # columns hidden in a branch's gap: position = column - gap
        self.active = np.zeros(count, bool)
        self.trunk_fed = np.zeros(count, np.int64)
        self.trunk_end = np.zeros(count, np.int64)  # 0 = no branch
        self.awaited = np.full(count, -1, np.int64)  # the last tick in which an idle slot may yet be continued
        self.tick = 0
        self._homes: dict[str, int] = {}  # completion → the slot of its newest request, probes apart
        self._owners: list[str | None] = [None] * count  # the same by slot

    def place(self, token_ids: np.ndarray, max_tokens: int, scratch: bool, completion: str) -> Placement | None:
        """The best slot for a request; None when all are active. `token_ids` int32 [n], all but the last to be cached.

        A sequence whose cache is in an idle slot goes on there. What is in an active slot, or would be lost by going
        on in place, is copied to another. `scratch` requests branch off an idle slot's trunk where there is room.
        """
        if self.active.all():
            return None
        best, n = self._nearest(token_ids, completion)
        if n and not self.active[best]:
            lost = int(self.fed[best]) - n
            room = self.columns - int(self.end[best]) - (len(token_ids) - n) - max_tokens
            if lost and scratch and room >= 0:
                return Placement(best, n, best, branch=True)
            if lost <= _REWIND:
                return Placement(best, n, best)
        target = self._free(avoid=best if n else -1)
        if target is None:  # the only idle slot is the one with the shared tokens
            return Placement(best, n, best)
        return Placement(target, n, best if n else target)

    def _nearest(self, token_ids: np.ndarray, completion: str) -> tuple[int, int]:
        """The slot whose cache holds most of the tokens, and how many; see `_shared`."""
        home = self._homes.get(completion)
        if home is not None:
            held = min(len(token_ids) - 1, int(self.trunk_fed[home] if self.trunk_end[home] else self.fed[home]))
            same = self.tokens[home, :held] == token_ids[:held]
            n = held if same.all() else int(same.argmin())
            if n >= len(token_ids) - 1 - _NEARLY:
                return home, n
        shared = self._shared(token_ids)
        best = int(np.argmax(2 * shared + ~self.active))
        return best, int(shared[best])

    def _shared(self, token_ids: np.ndarray) -> np.ndarray:
        """How many of `token_ids`, from the first on and without the last, each slot's cache holds, int64 [count]."""
        sought = token_ids.copy()
        sought[-1] = -1  # no token: what differs first is found in every row
        same = (self.tokens[:, : len(sought)] != sought).argmax(1)
        return np.minimum(same, np.where(self.trunk_end > 0, self.trunk_fed, self.fed))

    def _free(self, avoid: int) -> int | None:
        """The lowest idle slot that nobody is expected to continue, else the one awaited for the shortest time."""
        idle = ~self.active
        if avoid >= 0:
            idle[avoid] = False
        free = np.flatnonzero(idle)
        if not len(free):
            return None
        left = free[self.awaited[free] < self.tick]
        return int(left[0]) if len(left) else int(free[np.argmin(self.awaited[free])])

    def start(self, placement: Placement, token_ids: np.ndarray, scratch: bool, completion: str) -> None:
        """Put a request's tokens into its slot."""
        slot, n = placement.slot, placement.shared
        if not placement.branch:
            self._own(slot, None if scratch else completion)
        begin = n
        if placement.branch:
            self.trunk_fed[slot], self.trunk_end[slot] = self.fed[slot], self.end[slot]
            begin = int(self.end[slot])
            self.gap[slot] = begin - n
        self.tokens[slot, begin : begin + len(token_ids) - n] = token_ids[n:]
        if placement.source != slot:
            self.tokens[slot, :n] = token_ids[:n]
        self.fed[slot] = begin
        self.end[slot] = begin + len(token_ids) - n
        self.active[slot] = True

    def _own(self, slot: int, completion: str | None) -> None:
        """The slot holds this completion's sequence from now on, and not another's."""
        before = self._owners[slot]
        if before is not None and self._homes.get(before) == slot:
            del self._homes[before]
        self._owners[slot] = completion
        if completion is not None:
            self._homes[completion] = slot

    def gaps(self, slots: Sequence[int] | np.ndarray | slice) -> np.ndarray | None:
        """Each slot's columns that its branch does not see, the first and the one behind the last, int64 [n, 2]; None
        if none of the slots has a branch."""
        end = self.trunk_end[slots]
        return np.stack([end - self.gap[slots], end], 1) if end.any() else None

    def stop(self, slot: int, at_word: bool, scratch: bool) -> None:
        """The slot falls idle, its tokens kept for a continuation; a branch is dropped.

        `at_word`: the request stopped at a stop word; `scratch`: it was one that will not be continued.
        """
        self.active[slot] = False
        if not self.trunk_end[slot]:
            self.awaited[slot] = self.tick + (-1 if scratch else _HELD if at_word else _RECENT)
            return
        self.awaited[slot] = self.tick + _RECENT
        self.fed[slot], self.end[slot] = self.trunk_fed[slot], self.trunk_end[slot]
        self.gap[slot] = self.trunk_end[slot] = 0

    def forget(self, slot: int) -> None:
        """Nothing in an idle slot's cache is valid any more."""
        self.fed[slot] = self.end[slot] = self.gap[slot] = self.trunk_end[slot] = 0
        self.awaited[slot] = -1

    def move(self, source: int, target: int) -> None:
        """Hand an active slot's sequence over to an idle slot."""
        for array in (self.tokens, self.logprobs, self.fed, self.end, self.gap, self.trunk_fed, self.trunk_end):
            array[target] = array[source]
        self.active[target], self.active[source] = True, False
        self._own(target, self._owners[source])
        self.forget(source)

    def straighten(self, slot: int) -> int:
        """Turn a branch into a trunk of its own; returns by how many columns its newest tokens moved down."""
        gap = int(self.gap[slot])
        if self.trunk_end[slot]:
            for array in (self.tokens, self.logprobs):
                array[slot, self.trunk_end[slot] - gap : self.end[slot] - gap] = array[
                    slot, self.trunk_end[slot] : self.end[slot]
                ].copy()
            self.fed[slot] -= gap
            self.end[slot] -= gap
            self.gap[slot] = self.trunk_end[slot] = 0
        return gap
