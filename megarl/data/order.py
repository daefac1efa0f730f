"""The order of the prompts in every epoch: a function of (seed, epoch) alone, the same on any machine.

It comes from the raw stream of Philox, which numpy guarantees. What numpy builds on top of it may change with versions.
"""

from __future__ import annotations

import numpy as np

from megarl.types import derive_seed


class EpochOrder:
    """Permutations of `0 … prompts - 1`, one per epoch. It keeps the newest, 4 bytes per prompt.

    At least a third of the others lie between two visits of a prompt, also where one epoch meets the next. A training
    step that draws fewer prompts than that never has one twice.
    """

    def __init__(self, prompts: int, seed: int, shuffle: bool) -> None:
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int32)

    def __call__(self, epoch: int) -> np.ndarray:
        """The indices of epoch 0, 1, … in the order in which they are drawn; int32 [prompts]."""
        if epoch != self._epoch:
            self._order = self._make(epoch)
            self._epoch = epoch
        return self._order

    def _make(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.prompts, dtype=np.int32)
        order = self._shuffled(epoch)
        if epoch == 0:
            return order
        # Prompts that ended the last epoch must not begin this one: they swap places with others from the middle. The
        # end stays as shuffled, so that the next epoch need not know of the swaps.
        third = self.prompts // 3
        just_seen = np.zeros(self.prompts, dtype=bool)
        just_seen[self._shuffled(epoch - 1)[self.prompts - third :]] = True
        too_early = np.flatnonzero(just_seen[order[:third]])
        middle = third + np.flatnonzero(~just_seen[order[third : self.prompts - third]])[: len(too_early)]
        order[too_early], order[middle] = order[middle], order[too_early]
        return order

    def _shuffled(self, epoch: int) -> np.ndarray:
        raw = np.random.Philox(key=derive_seed(self.seed, "epoch", epoch)).random_raw(self.prompts)
        return np.argsort(raw, kind="stable").astype(np.int32)
