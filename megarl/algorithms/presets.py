"""The table of algorithms: each is a row of switches of the one loss function, none is a class.

| preset       | source           | what it switches                                                               |
|--------------|------------------|--------------------------------------------------------------------------------|
| grpo         | arXiv 2402.03300 | group-normalised advantage, mean over sequences of the mean over tokens        |
| dr_grpo      | arXiv 2503.20783 | no standard deviation, constant divisor                                        |
| dapo         | arXiv 2503.14476 | clip-higher, token mean, dynamic sampling (its overlong shaping is a reward)   |
| gspo         | arXiv 2507.18071 | one length-normalised ratio per sequence, hence the narrow clip                |
| cispo        | arXiv 2506.13585 | clipped ratio as a stop-gradient weight; no lower clip; bound 5 (2510.13786)   |
| rloo         | arXiv 2402.14740 | leave-one-out baseline; sequences summed, not averaged (constant divisor)      |
| reinforce_pp | arXiv 2501.03262 | group mean as the baseline, normalised over the batch, token mean              |

No preset sets a KL term, an entropy bonus, dual clip or truncated importance sampling: settings do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megarl import config
from megarl.errors import UserError

Advantage = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"]
Ratio = Literal["token", "sequence", "cispo"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]
OldLogprobs = Literal["policy", "recompute", "rollout"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True)
class Preset:
    """The switches of an algorithm; an explicit setting overrides its field."""

    advantage: Advantage
    ratio: Ratio
    aggregation: Aggregation
    clip_low: float
    clip_high: float
    dynamic_sampling: bool = False


PRESETS: dict[str, Preset] = {
    "grpo": Preset("grpo", "token", "sequence_mean", 0.2, 0.2),
    "dr_grpo": Preset("dr_grpo", "token", "constant", 0.2, 0.2),
    "dapo": Preset("grpo", "token", "token_mean", 0.2, 0.28, dynamic_sampling=True),
    "gspo": Preset("grpo", "sequence", "sequence_mean", 3e-4, 4e-4),
    "cispo": Preset("grpo", "cispo", "token_mean", 1.0, 4.0),
    "rloo": Preset("rloo", "token", "constant", 0.2, 0.2),
    "reinforce_pp": Preset("reinforce_pp", "token", "token_mean", 0.2, 0.2),
}


@dataclass(frozen=True, slots=True)
class Switches:
    """Every switch of the loss, with its value. `None` means off (dual clip, truncated importance sampling)."""

    advantage: Advantage
    ratio: Ratio
    aggregation: Aggregation
    constant: float  # divisor of `constant` aggregation, in tokens
    clip_low: float
    clip_high: float
    dynamic_sampling: bool
    old_logprobs: OldLogprobs  # `policy`: the policy's own, detached (one update per step)
    dual_clip: float | None = None
    tis_cap: float | None = None
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_reward_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"

    @property
    def zero_advantage_is_zero_gradient(self) -> bool:
        """Whether a completion of advantage 0 contributes nothing: no KL term and no entropy bonus in the loss."""
        return self.kl_loss_coef == 0 and self.entropy_coef == 0


def resolve(algorithm: config.Algorithm, max_response_tokens: int, updates_per_step: int) -> Switches:
    """The preset's switches, overridden by explicit settings; raises UserError for a setting that would do nothing."""
    preset = PRESETS[algorithm.preset]

    def choose(name: str):
        explicit = getattr(algorithm, name)
        return getattr(preset, name) if explicit is None else explicit

    kl = algorithm.kl
    switches = Switches(
        advantage=choose("advantage"),
        ratio=choose("ratio"),
        aggregation=choose("aggregation"),
        constant=float(algorithm.loss_divisor or max_response_tokens),
        clip_low=choose("clip_low"),
        clip_high=choose("clip_high"),
        dynamic_sampling=choose("dynamic_sampling"),
        old_logprobs=_old_logprobs(algorithm.old_logprobs, updates_per_step),
        dual_clip=algorithm.dual_clip,
        tis_cap=algorithm.tis_cap,
        entropy_coef=algorithm.entropy_coef,
        kl_loss_coef=kl.coef if kl.apply_to == "loss" else 0.0,
        kl_reward_coef=kl.coef if kl.apply_to == "reward" else 0.0,
        kl_estimator=kl.estimator,
    )
    _refuse_idle(algorithm, switches)
    return switches


def _old_logprobs(setting: Literal["auto", "recompute", "rollout"], updates_per_step: int) -> OldLogprobs:
    if setting == "auto":
        return "policy" if updates_per_step == 1 else "recompute"
    return setting


def _refuse_idle(algorithm: config.Algorithm, switches: Switches) -> None:
    """Refuse settings that have no effect because of others."""
    if algorithm.dual_clip is not None and switches.ratio == "cispo":
        raise UserError(
            f"algorithm.dual_clip: {algorithm.dual_clip:g} does nothing with ratio cispo, whose loss is already "
            "bounded; leave it unset, or set algorithm.ratio to token"
        )
    if algorithm.loss_divisor is not None and switches.aggregation != "constant":
        raise UserError(
            f"algorithm.loss_divisor: {algorithm.loss_divisor} does nothing with aggregation {switches.aggregation}; "
            "leave it unset, or set algorithm.aggregation to constant"
        )
    if algorithm.tis_cap is not None and switches.old_logprobs == "rollout":
        raise UserError(
            f"algorithm.tis_cap: {algorithm.tis_cap:g} does nothing when old_logprobs is rollout, because the ratio "
            "is then against the rollout itself; leave it unset, or set algorithm.old_logprobs to recompute"
        )
