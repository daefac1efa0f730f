"""Settings of what is learned: reward, loss, pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Fraction, Natural, Positive, Rate, Section


class Reward(Section):
    function: str = "megarl.rewards.math:grade"
    """`package.module:function(response: str, answer: str) -> bool | float | Verdict`."""
    workers: Positive = 2
    """Grader processes."""
    timeout: Annotated[float, Field(gt=0)] = 10.0
    """Seconds a verdict may take before its worker is killed."""
    shaping: Literal["none", "step_aware", "length_penalty", "overlong"] = "none"
    """Step-GRPO's step-aware reward, a linear length penalty, or DAPO's soft overlong punishment."""
    alpha: Fraction = 0.9
    """Share of correctness against format: R = alpha * acc + (1 - alpha) * fmt. 1 = correctness alone."""
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Strength of the step-aware term."""
    step_mean: Literal["correct", "all"] = "correct"
    """Over which completions of the group the mean step count is taken."""
    markers: list[str] = ["Wait"]
    """Step markers counted by the reward; the rollout has its own list."""
    length_penalty: Annotated[float, Field(ge=0.0)] = 0.0
    """Reward taken off per response token (shaping = length_penalty)."""
    overlong_buffer: Natural = 4096
    """Tokens before the limit over which the overlong punishment grows from 0 to 1 (shaping = overlong)."""


class KL(Section):
    coef: Annotated[float, Field(ge=0.0)] = 0.0
    """0 = no reference model is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL divergence from a token's log-probs: log ratio, half its square, or the unbiased one >= 0."""
    apply_to: Literal["loss", "reward"] = "loss"
    """A term of the loss, or taken off the reward of a completion."""


class Algorithm(Section):
    """Switches of the one loss function. A preset fills what is not set; see algorithms/presets.py."""

    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"] = "grpo"
    """The algorithm: a row of algorithms/presets.py."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] | None = None
    """Group-normalised; group-centred; leave-one-out; centred in the group and normalised over the batch."""
    ratio: Literal["token", "sequence", "cispo"] | None = None
    """Importance ratio: per token (PPO), per sequence (GSPO), or clipped weight with stop-gradient (CISPO)."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] | None = None
    """What the summed loss is divided by."""
    loss_divisor: Positive | None = None
    """Divisor of `constant` aggregation, in tokens; default: the response budget."""
    clip_low: Annotated[float, Field(ge=0.0)] | None = None
    """Lower clip: the ratio is held above 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0.0)] | None = None
    """Upper clip: the ratio is held below 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound on the loss of negative advantages (off when unset)."""
    tis_cap: Annotated[float, Field(gt=0.0)] | None = None
    """Truncated importance sampling between rollout and training log-probs (off when unset)."""
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Strength of the entropy bonus; 0 = off."""
    kl: KL = KL()
    dynamic_sampling: bool | None = None
    """DAPO: leave out groups whose rewards are all equal and draw further prompts in their place."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Denominator of the ratio. `auto`: the policy's own when a step has one update, else recomputed."""


class Pruning(Section):
    """DPPO, dynamic pruning policy optimization (arXiv 2603.04135). Rates of 0 switch it off."""

    prompts: Rate = 0.0
    """r_q: chance that a prompt of below-mean history is left out before the rollout."""
    completions: Rate = 0.0
    """r_o: chance that a completion of below-mean |advantage| is left out before training."""
    sampling: Literal["bernoulli", "fixed"] = "bernoulli"
    """Independent draws, or exactly floor(rate * n) of the low class."""
    selection: Literal["random_low", "proportional", "deterministic"] = "random_low"
    """`proportional` keeps the low ones with chance score / mean score, at least 1 - rate: less added variance.
    `deterministic` drops the lowest: an ablation, biased."""
    drop_zero_variance: bool = True
    """Leave out groups whose rewards are all equal when there is no KL or entropy term (exact then)."""
    refill: bool = True
    """Draw further prompts for the pruned ones, so that each step rolls out prompts_per_step."""
    until_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """No pruning after this share of the run."""
    min_effective: Fraction = 0.25
    """Warn when the effective sample size falls below this share of the kept samples."""
