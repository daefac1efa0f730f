"""The KV cache: keys and values of the sequences in the slots."""

from __future__ import annotations

import torch

from megarl.errors import UserError
from megarl.models.shape import ModelShape

GIB = 2**30


def check_room(
    shape: ModelShape, sequences: int, tokens: int, device: torch.device, dtype: torch.dtype, experts: bool
) -> None:
    """UserError unless an engine's weights and its cache for `sequences` sequences fit into the device's free memory.

    It names the nearest number that fits. Memory of a CPU is not limited.
    """
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    weights, width = dtype.itemsize * shape.parameters(), dtype.itemsize
    needed = shape.cache_bytes(sequences, tokens, width, experts)
    if weights + needed <= free:
        return
    each = shape.cache_bytes(0, tokens, width, experts)
    most = (free - weights) // each - 1  # one is for scoring
    raise UserError(
        f"rollout.local_max_sequences: {sequences} sequences of {tokens:,} tokens take {needed / GIB:.1f} GiB beside "
        f"{weights / GIB:.1f} GiB of weights, and {device} has {free / GIB:.1f} GiB free; "
        + (f"nearest value that fits: {most}" if most > 0 else "none fits; use rollout.engine=sglang")
    )


class KVCache:
    """Room for `slots` sequences of `columns` tokens, per layer.

    Keys are [slots, groups, head_dim, columns] and values [slots, groups, columns, head_dim], so that both products of
    attention read memory in order. `experts` int16 [slots, columns, layers, top_k] are those that each token passed
    through, if they are kept. Padding writes to column `spare`, the last one, which nothing reads.
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
        """Keeps `top_k` experts a token and layer; 0 = none."""
        self.spare = columns
        self._keys = torch.zeros(layers, slots, groups, head_dim, columns + 1, device=device, dtype=dtype)
        self._values = torch.zeros(layers, slots, groups, columns + 1, head_dim, device=device, dtype=dtype)
        self.keys, self.values = self._keys.unbind(), self._values.unbind()
        self._slot_keys, self._slot_values = self._keys.unbind(1), self._values.unbind(1)
        self.experts = torch.zeros(slots, columns + 1, layers, top_k, device=device, dtype=torch.int16)

    def copy(self, source: int, target: int, end: int) -> None:
        """Copy columns [0, end) of one sequence over another's."""
        for slots, columns in ((self._slot_keys, -1), (self._slot_values, -2)):
            slots[target].narrow(columns, 0, end).copy_(slots[source].narrow(columns, 0, end))
        if self.experts.shape[-1]:
            self.experts[target, :end] = self.experts[source, :end]
