"""Keys and values of the sequences that are being decoded, and which of them each sequence sees."""

from __future__ import annotations

import torch


class KVCache:
    """Room for `slots` sequences of `columns` tokens, per layer.

    Keys are [slots, groups, head_dim, columns] and values [slots, groups, columns, head_dim]: the layouts in which both
    products of attention read memory in order. `bias` [slots, columns] is added to the scores: 0 where a sequence sees
    the column, -inf elsewhere. `experts` int16 [slots, columns, layers, top_k] are those that a token passed through,
    where they are kept. Column `spare`, the last, takes what padding writes and is never read.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        groups: int,
        head_dim: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype,
        top_k: int = 0,
    ) -> None:
        """`top_k` experts a token and layer are kept; 0 = none."""
        self.spare = columns
        self._keys = torch.zeros(layers, slots, groups, head_dim, columns + 1, device=device, dtype=dtype)
        self._values = torch.zeros(layers, slots, groups, columns + 1, head_dim, device=device, dtype=dtype)
        self.keys, self.values = self._keys.unbind(), self._values.unbind()
        self.experts = torch.zeros(slots, columns + 1, layers, top_k, device=device, dtype=torch.int16)
        self.bias = torch.full((slots, columns + 1), float("-inf"), device=device, dtype=dtype)
        self.bias[:, 0] = 0  # an idle slot sees something: its scores stay finite

    def show(self, slot: int, end: int, gap: tuple[int, int] = (0, 0)) -> None:
        """Let a sequence see columns [0, end) but not [gap[0], gap[1])."""
        row = self.bias[slot]
        row[:end] = 0
        row[max(end, 1) :] = float("-inf")
        row[gap[0] : gap[1]] = float("-inf")

    def copy(self, source: int, target: int, end: int) -> None:
        """Copy columns [0, end) of one sequence over another's."""
        self._keys[:, target, ..., :end] = self._keys[:, source, ..., :end]
        self._values[:, target, :, :end] = self._values[:, source, :, :end]
        self.experts[target, :end] = self.experts[source, :end]
