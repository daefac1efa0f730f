"""Dynamic pruning policy optimization (DPPO, arXiv 2603.04135): chances of being dropped, draws, weights.

Two levels. A prompt is pruned *before* its rollout by its history H, the mean |advantage| of its last visit; a
completion is pruned *after* its reward by its own |advantage|, taken from the whole group:

    P_q = r_q  if H(q) < mean H over visited prompts, else 0; 0 for a prompt never visited
    P_o = r_o  if |A_i| < mean |A| of its group, else 0

A kept sample has the Horvitz-Thompson weight 1 / ((1 - P_q) (1 - P_o)), which multiplies its whole term of the loss,
KL and entropy included (`loss.token_scale`). With denominators of the unpruned batch, the expected gradient is exactly
the unpruned gradient; `megarl bench unbiased` proves it by enumeration. The denominators:

- completions: the sequences and tokens of the group are known, pruned or not;
- prompts: pruned ones have no tokens to count. `unpruned_prompts` gives their number, `ExpectedLength` the expected
  tokens of a response. Dividing by a weighted count of this step's kept tokens would be biased: a ratio of two random
  sums.

The paper gives no thresholds. Its Algorithm 1 drops a deterministic lowest fraction, which its theorem does not cover.
The rule above follows InfoBatch (2303.04947) and CPPO (2503.22342). `selection: deterministic` is the ablation.
`selection: proportional` (ours) keeps a low sample with chance H / mean H or |A_i| / mean |A|, but at least 1 - r. It
rarely drops those just below the mean, whose loss would cost most.

Every draw comes from `uniforms(count, *key)`, a function of its key: the same on any layout and after any resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from megarl import config
from megarl.algorithms.presets import Switches
from megarl.errors import UserError
from megarl.types import derive_seed

Draw = Literal["bernoulli", "fixed"]
Selection = Literal["random_low", "proportional", "deterministic"]

TIE = 1e-6
"""Relative. Values this close to the mean are not below it: equal |advantages| differ by rounding."""


class History:
    """The last score of every prompt, by its position in the data, and their mean. 4 bytes per prompt."""

    def __init__(self, prompts: int) -> None:
        self._scores = np.full(prompts, np.nan, dtype=np.float32)
        self._sum = 0.0
        self._visited = 0

    def __len__(self) -> int:
        return len(self._scores)

    def score(self, index: int) -> float | None:
        """H of the prompt's last visit; None before the first."""
        score = float(self._scores[index])
        return None if np.isnan(score) else score

    def update(self, index: int, mean_abs_advantage: float) -> None:
        """Record a visit: the mean |advantage| of the whole group. Pruned prompts are not visited."""
        score = float(np.float32(mean_abs_advantage))
        if not 0 <= score < np.inf:
            raise ValueError(f"mean |advantage| of prompt {index} is {mean_abs_advantage}, not a finite number >= 0")
        old = self.score(index)
        self._sum += score - (old or 0.0)
        self._visited += old is None
        self._scores[index] = score

    def mean(self) -> float | None:
        """Mean score over the prompts visited at least once; None when there is none."""
        return self._sum / self._visited if self._visited else None

    def state(self) -> dict[str, np.ndarray]:
        """A copy of the state, as arrays for one .npz; `restore` brings it back bit by bit."""
        return {"scores": self._scores.copy(), "sum": np.array(self._sum), "visited": np.array(self._visited)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a `state` of the same data; raises UserError if it has another number of prompts."""
        scores = np.asarray(state["scores"])
        if scores.shape != self._scores.shape:
            raise UserError(
                f"data.train: has {len(self)} prompts, the checkpoint's pruning history {len(scores)}; resume with the "
                "data that the run started with"
            )
        self._scores = scores.astype(np.float32, copy=True)
        self._sum = float(state["sum"])
        self._visited = int(state["visited"])


class ExpectedLength:
    """The expected response tokens of a completion, from earlier steps only.

    It is the token mean's denominator under prompt pruning, which this step's draw must not influence. A decayed
    Horvitz-Thompson mean (half-life: 7 steps).
    """

    DECAY = 0.9

    def __init__(self) -> None:
        self._tokens = 0.0
        self._sequences = 0.0

    def update(self, lengths: np.ndarray, weights: np.ndarray) -> None:
        """Add a step: all its completions' lengths, each with the prompt-level weight 1 / (1 - P_q) of its group."""
        self._tokens = self.DECAY * self._tokens + float(np.dot(weights, lengths))
        self._sequences = self.DECAY * self._sequences + float(np.sum(weights))

    def mean(self) -> float | None:
        """Tokens; None before the first step."""
        return self._tokens / self._sequences if self._sequences else None

    def state(self) -> dict[str, np.ndarray]:
        return {"tokens": np.array(self._tokens), "sequences": np.array(self._sequences)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self._tokens, self._sequences = float(state["tokens"]), float(state["sequences"])


def uniforms(count: int, *key: object) -> np.ndarray:
    """`count` numbers in [0, 1), a function of the key: `(seed, epoch, prompt uid)`. float64 [count].

    The i-th does not depend on `count` or on earlier draws.
    """
    return np.array([derive_seed("prune", *key, i) / 2**63 for i in range(count)])


def prompt_weights(
    history: History,
    indices: np.ndarray,
    uniform: np.ndarray,
    rate: float,
    draw: Draw = "bernoulli",
    selection: Selection = "random_low",
) -> np.ndarray:
    """Weights of candidate prompts by their history, float64 [n]: 0 = pruned, else 1 / (1 - P_q).

    `indices` [n] are positions in the data, `uniform` [n] their draws: `uniforms(1, seed, epoch, uid)` of each; `rate`
    is r_q. With Bernoulli draws, a prompt's result does not depend on the other candidates. A fixed-size or
    deterministic selection is made among the low ones of this call.
    """
    mean = history.mean() or 0.0
    scores = [history.score(int(i)) for i in indices]
    relative = np.array([1.0 if score is None or not mean else score / mean for score in scores])
    return _weights(relative, uniform, rate, draw, selection)


def completion_weights(
    advantages: np.ndarray,
    uniform: np.ndarray,
    rate: float,
    draw: Draw = "bernoulli",
    selection: Selection = "random_low",
    drop_zero_variance: bool = False,
) -> np.ndarray:
    """Weights of one whole group's completions, float64 [G]: 0 = pruned, else 1 / (1 - P_o).

    `advantages` [G] from the whole group; `uniform` [G]: `uniforms(G, seed, epoch, uid)`, by completion index; `rate`
    is r_o. `drop_zero_variance`: see `may_drop_zero_variance`; a group whose advantages are all 0 is then dropped
    (its sequences and tokens stay in the denominators).
    """
    magnitude = np.abs(np.asarray(advantages, dtype=np.float64))
    if not magnitude.any():
        return np.full(len(magnitude), 0.0 if drop_zero_variance else 1.0)
    return _weights(magnitude / magnitude.mean(), uniform, rate, draw, selection)


def may_drop_zero_variance(settings: config.Pruning, switches: Switches) -> bool:
    """Whether groups of equal rewards are dropped: if the setting says so, and if only advantages act in the loss."""
    return settings.drop_zero_variance and switches.zero_advantage_is_zero_gradient


def active(settings: config.Pruning, step: int, steps: int) -> bool:
    """Whether step `step` of `steps` (from 1) prunes at random: not after the fraction `until_fraction` of the run."""
    return step <= settings.until_fraction * steps + 1e-9


def unpruned_prompts(taken: int, kept: int, refilled: bool) -> float:
    """The number of unpruned prompts of a step, the denominator when `kept` of `taken` prompts were rolled out.

    Without refilling it is `taken`. With refilling, prompts are taken until `kept` are kept: `taken` is then random and
    ends on a kept prompt, so dividing by it is biased. Haldane's estimator for inverse sampling (Biometrika 33, 1945)
    leaves out the last draw. Averaged over which prompt that is, it divides by (taken - 1) * kept / (kept - 1). For
    kept = 1 there is no such estimator, and `taken` is returned.
    """
    if not refilled or kept < 2:
        return float(taken)
    return (taken - 1) * kept / (kept - 1)


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)² / sum w² (Kish): the number of equally weighted samples with the same variance."""
    weights = np.asarray(weights, dtype=np.float64)
    square = float((weights**2).sum())
    return float(weights.sum()) ** 2 / square if square else 0.0


def added_variance(magnitude: np.ndarray, weights: np.ndarray) -> float:
    """Estimate of the variance that pruning adds to the summed gradient: sum over all samples of g² P / (1 - P).

    Estimated from the kept samples, for which P / (1 - P) = w - 1 and whose own weight is w: sum of g² w (w - 1).
    `magnitude` [n] stands for the norms g of the samples' gradients. Before the backward pass, |advantage| is the proxy
    (in units of A²; compare with sum of w A², the variance of the batch itself). Independent draws are assumed:
    fixed-size draws add a little less, completions of one pruned prompt a little more.
    """
    weights = np.asarray(weights, dtype=np.float64)
    return float((np.asarray(magnitude, np.float64) ** 2 * weights * np.maximum(weights - 1, 0)).sum())


def warning(weights: np.ndarray, settings: config.Pruning) -> str | None:
    """One line if the kept samples' effective number is below `min_effective` of their number, else None."""
    kept = int(np.count_nonzero(weights))
    effective = effective_sample_size(weights)
    if effective >= settings.min_effective * kept:
        return None
    return (
        f"pruning: the {kept} kept samples are worth {effective:.1f}, below pruning.min_effective "
        f"{settings.min_effective:g} of them; lower pruning.prompts ({settings.prompts:g}) or pruning.completions "
        f"({settings.completions:g})"
    )


def notice(settings: config.Pruning) -> str | None:
    """A warning about the chosen selection for the start of the log; None if it is unbiased."""
    if settings.selection == "deterministic" and (settings.prompts or settings.completions):
        return "pruning.selection: deterministic is biased (an ablation); random_low is the unbiased estimator"
    return None


def _weights(relative: np.ndarray, uniform: np.ndarray, rate: float, draw: Draw, selection: Selection) -> np.ndarray:
    """Weights: 0 for dropped members of the low class, 1 / (1 - P) for its other members, 1 outside it.

    `relative` [n]: each score over the mean score. The low class lies below 1.
    """
    weights = np.ones(len(relative))
    members = np.flatnonzero(relative < 1 - TIE)
    if draw == "bernoulli" and selection != "deterministic":
        chance = np.full(len(members), rate)
        if selection == "proportional":
            chance = np.minimum(chance, 1 - relative[members])
        weights[members] = np.where(uniform[members] < chance, 0.0, 1 / (1 - chance))
        return weights
    dropped = int(rate * len(members) + 1e-9)
    if dropped:
        rank = relative if selection == "deterministic" else uniform
        order = members[np.argsort(rank[members], kind="stable")]
        weights[members] = len(members) / (len(members) - dropped)  # the realised keep rate
        weights[order[:dropped]] = 0.0
    return weights
