"""Random rows for the loss tests."""

from __future__ import annotations

import numpy as np
import torch

from megarl.types import MicroBatch


def make_row(
    lengths: list[int], seed: int = 0, prompt: int = 2, drift: float = 0.4, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, MicroBatch]:
    """A row of random samples: `prompt` masked positions, then lengths[i] learned ones; one masked tail of padding.

    Masked positions hold nan everywhere that nan can stand. About one learned token in four was inserted, one in six
    has no old log-prob, one in six no reference and one in seven no advantage.
    """
    rng = np.random.default_rng(seed)
    learned = np.concatenate([[False] * prompt + [True] * n for n in lengths] + [[False] * 3])
    sequence = np.concatenate([[i] * (prompt + n) for i, n in enumerate(lengths)] + [[len(lengths) - 1] * 3])
    size = len(learned)

    def values(low: float, high: float) -> torch.Tensor:
        return torch.tensor(np.where(learned, rng.uniform(low, high, size), np.nan), dtype=dtype)

    def holes(tensor: torch.Tensor, share: float) -> torch.Tensor:
        return torch.where(torch.from_numpy(rng.random(size) < share), torch.nan, tensor)

    logprobs, entropy = values(-3, -0.1).requires_grad_(), values(0, 2).requires_grad_()
    old = logprobs.detach() + values(-drift, drift)
    rollout = holes(old + values(-0.3, 0.3), 0.25)
    micro = MicroBatch(
        tokens=torch.zeros(size, dtype=torch.long),
        labels=torch.zeros(size, dtype=torch.long),
        positions=torch.zeros(size, dtype=torch.long),
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        sequence=torch.from_numpy(sequence),
        scale=torch.tensor(np.where(learned, rng.uniform(0.01, 1, size), 0), dtype=dtype),
        advantage=values(-2, 2).where(torch.from_numpy(rng.random(size) < 0.85), 0),
        sampled=~torch.isnan(rollout),
        rollout_logprobs=rollout,
        old_logprobs=holes(old, 1 / 6),
        ref_logprobs=holes(logprobs.detach() + values(-0.8, 0.8), 1 / 6),
    )
    return logprobs, entropy, micro
