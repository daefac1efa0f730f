"""The sampler: one uniform number a token from a counter-based stream, turned into a token by the inverse CDF.

A draw is a function of (seed, position, logits) alone. It does not depend on the rest of the batch.
"""

from __future__ import annotations

import numpy as np
import torch

from megarl.rollout.engine import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Sampler:
    """The sampling parameters of every slot's request."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._device = device
        self._seed = np.zeros(slots, np.uint64)
        self._offset = np.zeros(slots, np.int64)  # response tokens before the first sampled one
        self._parameters = np.zeros((3, slots), np.float32)  # temperature, top-p, top-k
        self._on_device: tuple[torch.Tensor, ...] = ()  # the same for the slots drawn last; empty after a change

    def enter(self, slot: int, sampling: Sampling) -> None:
        """Sample as the slot's new request asks."""
        self._seed[slot], self._offset[slot] = sampling.seed, sampling.offset
        self._parameters[:, slot] = sampling.temperature, sampling.top_p, sampling.top_k
        self._on_device = ()

    def move(self, source: int, target: int) -> None:
        for array in (self._seed, self._offset, self._parameters.T):
            array[target] = array[source]
        self._on_device = ()

    def draw(self, logits: torch.Tensor, sampled: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One token for each of the first n slots, int64 [n], and its log-prob, float32 [n]; see `sample`.

        `logits` float32 [n, V]; `sampled` int64 [n] tokens that each request has already. Of the slots that are not
        `active`, bool [n], the result has no meaning.
        """
        n = len(sampled)
        uniform = uniforms(self._seed[:n], (self._offset[:n] + sampled).clip(0))
        tokens, logprobs = sample(logits, self._upload(uniform), *self._tensors(active))
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _tensors(self, active: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Temperature [n] and, if any active request truncates, top-p and top-k [n]."""
        n = len(active)
        if not self._on_device or len(self._on_device[0]) != n:
            temperature, top_p, top_k = self._parameters[:, :n]
            arrays = [temperature.copy()]
            if ((top_p < 1) & active).any() or ((top_k > 0) & active).any():
                arrays += [top_p.copy(), top_k.astype(np.int64)]
            self._on_device = tuple(map(self._upload, arrays))
        return self._on_device

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 [B]: the `positions[i]`-th of the stream of `seeds[i]`.

    Both integer [B]. The stream is SplitMix64's (Steele, Lea & Flood 2014), started at a scrambled seed, so that
    the streams of neighbouring seeds do not overlap.
    """
    with np.errstate(over="ignore"):
        state = _scramble(seeds.astype(np.uint64) + _GOLDEN) + _GOLDEN * positions.astype(np.uint64)
        return (_scramble(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _scramble(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, int64 [B], and its log-prob at `temperature` before top-p and top-k, float32 [B].

    `logits` float32 [B, V]; `uniform` float64 [B] in [0, 1); `temperature` [B], where 0 takes the most likely token
    and its log-prob at temperature 1. `top_k` int64 [B] (0 = all) is applied first, `top_p` [B] to what it leaves.
    """
    greedy = temperature == 0
    logprobs = (logits / torch.where(greedy, 1.0, temperature)[:, None]).log_softmax(-1)
    weights = logprobs.exp()
    if top_p is not None and top_k is not None:
        weights = _truncate(weights, top_p, top_k)
    cdf = weights.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _truncate(weights: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """`weights` [B, V] with 0 for the tokens that top-k and top-p leave out; the most likely one always stays."""
    ordered, order = torch.sort(weights, stable=True, dim=-1, descending=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    ordered = ordered.masked_fill((rank >= top_k[:, None]) & (top_k[:, None] > 0), 0.0)
    enough = ordered.cumsum(-1) - ordered >= top_p[:, None] * ordered.sum(-1, keepdim=True)
    ordered = ordered.masked_fill(enough & (top_p[:, None] < 1), 0.0)
    return torch.zeros_like(weights).scatter_(1, order, ordered)
