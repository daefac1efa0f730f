"""The prefix cache: which slot has a request's first tokens already, and which slot the request takes."""

from __future__ import annotations

import numpy as np

from megarl.rollout.local.slots import Placement, SlotTable

_MAX_REWIND = 64  # going back by more tokens than this copies the slot: the tokens behind may be continued too
_CLOSE_ENOUGH = 8  # a completion's own slot that lacks no more tokens than this is taken without a search


class PrefixCache:
    """The cached prefixes of a slot table."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots

    def place(self, token_ids: np.ndarray, max_tokens: int, scratch: bool, completion: str) -> Placement | None:
        """The best slot for a request; None when all are active. `token_ids` int32 [n], all but the last to be cached.

        A sequence in an idle slot continues there. It is copied to another slot when it is in an active one, or when
        continuing in place would lose much of it. `scratch` requests branch off an idle slot's trunk if there is room.
        """
        slots = self._slots
        free = np.flatnonzero(~slots.active)
        if not len(free):
            return None
        best, n = self._nearest(token_ids, completion)
        if n and not slots.active[best]:
            lost = int(slots.fed[best]) - n
            room = slots.columns - int(slots.end[best]) - (len(token_ids) - n) - max_tokens
            if lost and scratch and room >= 0:
                return Placement(best, n, best, branch=True)
            others = free[free != best]
            if lost <= _MAX_REWIND or not len(others):
                return Placement(best, n, best)
            free = others
        # The lowest slot that is not reserved, else the one whose reservation ends first.
        target = int(free[slots.reserved[free].clip(-1).argmin()])
        return Placement(target, n, best if n else target)

    def search(self, token_ids: np.ndarray) -> tuple[int, int]:
        """The slot with the longest cached prefix of `token_ids` without the last one, and that prefix's length."""
        sought = token_ids.copy()
        sought[-1] = -1  # no token: every row has a first difference
        same = (self._slots.tokens[:, : len(sought)] != sought).argmax(1)
        shared = np.minimum(same, self._slots.cached())
        best = int(np.argmax(2 * shared + ~self._slots.active))
        return best, int(shared[best])

    def _nearest(self, token_ids: np.ndarray, completion: str) -> tuple[int, int]:
        """As `search`, after a look at the completion's own slot."""
        slots = self._slots
        if completion in slots.completions:
            own = slots.completions.index(completion)
            known = min(len(token_ids) - 1, int(slots.cached()[own]))
            same = slots.tokens[own, :known] == token_ids[:known]
            n = known if same.all() else int(same.argmin())
            if n >= len(token_ids) - 1 - _CLOSE_ENOUGH:
                return own, n
        return self.search(token_ids)
