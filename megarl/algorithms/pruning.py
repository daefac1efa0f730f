"""Dynamic pruning policy optimization (DPPO, arXiv 2603.04135): what is dropped, with what chance, at what weight.

Two levels. A prompt is pruned *before* its rollout by its history H, the mean |advantage| of its last visit; a
completion is pruned *after* its reward by its own |advantage|, taken from the whole group:

    P_q = r_q  if H(q) < mean H over visited prompts, else 0; 0 for a prompt never visited
    P_o = r_o  if |A_i| < mean |A| of its group, else 0

What is kept has the Horvitz-Thompson weight 1 / ((1 - P_q) (1 - P_o)), which multiplies the sample's whole term of
the loss, KL and entropy included (`loss.token_scale`). With denominators of the unpruned batch the gradient's
expectation is the unpruned gradient, exactly; `megarl bench unbiased` proves it by enumeration. The denominators:

- completions: the sequences and tokens of the group are known, pruned or not;
- prompts: pruned ones have no tokens to count. `unpruned_prompts` gives their number, `ExpectedLength` the tokens that
  a response is expected to have. Dividing by a weighted count of this step's kept tokens instead would be biased: a
  ratio of two random sums.

The paper gives no thresholds, and its Algorithm 1 drops a deterministic lowest fraction, which its theorem does not
cover; the rule above follows InfoBatch (2303.04947) and CPPO (2503.22342). `selection: deterministic` is the ablation.
`selection: proportional` (ours) keeps the low ones in proportion to what they can say, with chance H / mean H or
|A_i| / mean |A|, at least 1 - r: those just below the mean, whose loss would cost most, are all but never dropped.

Every draw comes from `uniforms(count, *key)`, a function of its key alone: equal on any layout and after any resume.
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
"""Relative. Values nearer than this to the mean are not below it: equal |advantages| differ by rounding."""


class History:
    """The last score of every prompt, by its position in the data: 4 bytes a prompt, mean kept as scores change."""

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
        """A copy of everything, as arrays for one .npz; `restore` gives it back bit by bit."""
        return {"scores": self._scores.copy(), "sum": np.array(self._sum), "visited": np.array(self._visited)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a `state` of the same data; raises UserError when it holds another number of prompts."""
        scores = np.asarray(state["scores"])
        if scores.shape != self._scores.shape:
            raise UserError(
                f"data.train: holds {len(self)} prompts, the checkpoint's pruning history {len(scores)}; resume with "
                "the data that the run was started with"
            )
        self._scores = scores.astype(np.float32, copy=True)
        self._sum = float(state["sum"])
        self._visited = int(state["visited"])


class ExpectedLength:
    """Response tokens a completion is expected to have, from earlier steps: the token mean's denominator under prompt
    pruning, which this step's draw must not influence. A decayed Horvitz-Thompson mean (half-life: 7 steps)."""

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

    The i-th does not depend on `count`, nor on anything drawn before.
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
    is r_q. With Bernoulli draws a prompt's fate is its own, whatever the candidates around it; a fixed-size or
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
    is r_o. `drop_zero_variance`: see `may_drop_zero_variance`; a group of advantages all 0 is then dropped whole (its
    sequences and tokens stay in the denominators).
    """
    magnitude = np.abs(np.asarray(advantages, dtype=np.float64))
    if not magnitude.any():
        return np.full(len(magnitude), 0.0 if drop_zero_variance else 1.0)
    return _weights(magnitude / magnitude.mean(), uniform, rate, draw, selection)


def may_drop_zero_variance(settings: config.Pruning, switches: Switches) -> bool:
    """Whether groups of equal rewards may be dropped: asked for, and exact, for nothing but the advantage acts."""
    return settings.drop_zero_variance and switches.zero_advantage_is_zero_gradient


def active(settings: config.Pruning, step: int, steps: int) -> bool:
    """Whether step `step` of `steps` (counted from 1) prunes at random: not after the share `until` of the run."""
    return step <= settings.until_fraction * steps + 1e-9


def unpruned_prompts(taken: int, kept: int, refilled: bool) -> float:
    """The number of prompts that a step stands for: the denominator when `kept` of `taken` prompts were rolled out.

    Without refilling it is `taken`. With refilling prompts are taken until `kept` have survived: `taken` is then random
    and ends on a survivor, and dividing by it is biased. Haldane's estimator for inverse sampling (Biometrika 33, 1945)
    leaves that last draw out; averaged over which survivor that is, it divides by (taken - 1) * kept / (kept - 1). No
    such estimator exists for kept = 1, where `taken` is returned.
    """
    if not refilled or kept < 2:
        return float(taken)
    return (taken - 1) * kept / (kept - 1)


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)² / sum w² (Kish), in samples: as many equally weighted ones vary as little. Dropped ones add nothing."""
    weights = np.asarray(weights, dtype=np.float64)
    square = float((weights**2).sum())
    return float(weights.sum()) ** 2 / square if square else 0.0


def added_variance(magnitude: np.ndarray, weights: np.ndarray) -> float:
    """Estimate of the variance that pruning adds to the summed gradient: sum over all samples of g² P / (1 - P).

    Estimated from the kept samples, for which P / (1 - P) = w - 1 and whose own weight is w: sum of g² w (w - 1).
    `magnitude` [n] stands for the norms g of the samples' gradients. Before the backward pass |advantage| is the proxy
    (then in units of A²; compare with sum of w A², the variance of the batch itself). Samples are taken as drawn
    independently: fixed-size draws add a little less, completions of one pruned prompt a little more.
    """
    weights = np.asarray(weights, dtype=np.float64)
    return float((np.asarray(magnitude, np.float64) ** 2 * weights * np.maximum(weights - 1, 0)).sum())


def warning(weights: np.ndarray, settings: config.Pruning) -> str | None:
    """One line when a step's kept samples are worth less than the share `min_effective` of their number, else None."""
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
    """What a run's log must say at its start about the chosen selection; None for the unbiased one."""
    if settings.selection == "deterministic" and (settings.prompts or settings.completions):
        return "pruning.selection: deterministic is biased (an ablation); random_low is the unbiased estimator"
    return None


def _weights(relative: np.ndarray, uniform: np.ndarray, rate: float, draw: Draw, selection: Selection) -> np.ndarray:
    """0 for what is dropped out of the low class, 1 / (1 - P) for the rest of it, 1 outside it.

    `relative` [n]: each score over the mean score. The low class is what lies below 1.
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
