"""Settings of what is learned: reward, loss, pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Fraction, Natural, Positive, Rate, Seconds, Section

DEFAULT_GRADER = "megarl.rewards.math:grade"


class Reward(Section):
    """How responses are graded, and what is added to correctness."""

    function: str = DEFAULT_GRADER
    """The grader, as `package.module:function`. It takes `(response: str, answer: str)` and returns a bool, a number,
    or `right`, `wrong`, `timeout` or `error`. The dry run tries it."""
    workers: Positive = 2
    """Grader processes. Raise it when `seconds_reward` is a large part of a step."""
    timeout: Seconds = 10.0
    """Seconds for one verdict. After that the worker is killed and the verdict is `timeout`."""
    shaping: Literal["none", "step_aware", "length_penalty", "overlong"] = "none"
    """What is added to correctness. `step_aware` is Step-GRPO's, `length_penalty` is linear, `overlong` is DAPO's soft
    punishment."""
    alpha: Fraction | None = None
    """Weight of the score in R = alpha * score + (1 - alpha) * fmt. fmt is 1 if the part after the thought has a
    `\\boxed{}`, else 0. Default: 0.9 with megarl's own grader, which reads the box, and 1 with any other function."""
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Strength of the step-aware term. 0 turns it off."""
    step_mean: Literal["correct", "all"] = "correct"
    """Which completions of a group count for the mean number of steps. `correct` is the paper's, `all` is an
    ablation."""
    length_penalty: Annotated[float, Field(ge=0.0)] = 0.0
    """Reward subtracted per response token. Only read with `shaping: length_penalty`."""
    overlong_buffer: Natural = 4096
    """Length in tokens of the zone before the budget where the punishment grows from 0 to 1. Only read with `shaping:
    overlong`."""

    @property
    def score_weight(self) -> float:
        """`alpha`, with its default filled in."""
        if self.alpha is not None:
            return self.alpha
        return 0.9 if self.function == DEFAULT_GRADER else 1.0


class KL(Section):
    """The KL divergence from the starting model."""

    coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the KL term. With 0, no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimate from a token's log-probs. `k1` is the log ratio, `k2` half its square, `k3` the unbiased one that is
    never negative."""
    apply_to: Literal["loss", "reward"] = "loss"
    """`loss` adds a term to the loss. `reward` subtracts it from each completion's reward."""


class Algorithm(Section):
    """The loss. A preset sets the switches below, and each one set here overrides the preset. See
    algorithms/presets.py."""

    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"] = "grpo"
    """The algorithm, by name."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] | None = None
    """`grpo` normalises over the group. `dr_grpo` only subtracts the group's mean. `rloo` leaves one out.
    `reinforce_pp` centres in the group and normalises over the batch. Default: the preset's."""
    ratio: Literal["token", "sequence", "cispo"] | None = None
    """Importance ratio per token (PPO), per sequence (GSPO), or as a clipped weight without gradient (CISPO). Default:
    the preset's."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] | None = None
    """What the summed loss is divided by: tokens, sequences, or `loss_divisor`. Default: the preset's."""
    loss_divisor: Positive | None = None
    """Divisor of `aggregation: constant`, in tokens. Default: `rollout.max_response_tokens`."""
    clip_low: Annotated[float, Field(ge=0.0)] | None = None
    """The ratio is clipped below 1 - clip_low. Default: the preset's."""
    clip_high: Annotated[float, Field(ge=0.0)] | None = None
    """The ratio is clipped above 1 + clip_high. Default: the preset's. Raise it to keep exploration alive."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound on the loss of negative advantages, e.g. 3. Default: no bound."""
    tis_cap: Annotated[float, Field(gt=0.0)] | None = None
    """Cap of the importance weight between rollout and training log-probs, e.g. 2. Default: no such weight.
    `async_steps` needs it."""
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the entropy bonus. 0 turns it off."""
    kl: KL = KL()
    dynamic_sampling: bool | None = None
    """Replace groups whose scores are all equal by fresh prompts, as DAPO does. When ten rounds bring no other group,
    the run is over. Default: the preset's."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Log-probs under the ratio. `auto` recomputes them only when a step has several updates. `rollout` takes the
    engine's."""


class Pruning(Section):
    """DPPO, dynamic pruning policy optimization (arXiv 2603.04135). Rates of 0 turn it off."""

    prompts: Rate = 0.0
    """r_q: chance to skip a prompt whose past advantages are below the mean. It needs data that is read more than
    once."""
    completions: Rate = 0.0
    """r_o: chance to drop a completion whose |advantage| is below its group's mean. It saves training time, not rollout
    time."""
    sampling: Literal["bernoulli", "fixed"] = "bernoulli"
    """`bernoulli` draws each one independently. `fixed` drops exactly floor(rate * n) of the low ones."""
    selection: Literal["random_low", "proportional", "deterministic"] = "random_low"
    """Which low ones go. `random_low` gives all the same chance. `proportional` keeps one with chance score / mean, at
    least 1 - rate, which adds less variance. `deterministic` drops the lowest: an ablation, biased."""
    drop_zero_variance: bool = True
    """Drop groups whose rewards are all equal. This happens only without KL and entropy terms, where it is exact."""
    refill: bool = True
    """Draw fresh prompts for the skipped ones, so that each step rolls out `batch.prompts_per_step`."""
    until_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Prune only during this share of the run. With 1, prune to the end."""
    min_effective: Fraction = 0.25
    """Warn when the effective sample size falls below this share of the kept samples."""
