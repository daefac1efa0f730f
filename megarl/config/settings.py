"""All settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megarl.config.algorithm import Algorithm, Pruning, Reward
from megarl.config.data import Batch, Data, Packing
from megarl.config.learner import Checkpoint, Experts, Model, Optimizer, Parallel, Precision
from megarl.config.rollout import Evaluation, Rollout
from megarl.config.section import Natural, Positive, Section


class Settings(Section):
    """A whole run."""

    run: Path
    """The run directory: config, metrics, rollouts, checkpoints, report."""
    seed: int = 0
    """Of every draw: order, sampling, pruning, random weights. The same seed repeats a run."""
    steps: Positive = 100
    """Training steps; one rollout each."""
    trackers: list[Literal["wandb", "mlflow"]] = []
    """Services that get the figures too, beside `metrics.jsonl` and TensorBoard: `pip install 'megarl[wandb,mlflow]'`.
    Their own environment variables say where: `WANDB_PROJECT`, `MLFLOW_TRACKING_URI` (a server's: a database of its own
    needs MLflow's full package) and so on."""
    async_steps: Natural = 0
    """So many steps' rollouts go on while one trains; 0 = strictly on-policy. No trained token is staler than so many
    updates; `algorithm.tis_cap` weighs the difference. More than 1 needs `rollout.partial`."""
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    experts: Experts = Experts()
    precision: Precision = Precision()
    batch: Batch = Batch()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    pruning: Pruning = Pruning()
    packing: Packing = Packing()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    collective_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds a collective between ranks may take before the run ends and says which."""
    heartbeat_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a sign of life after which a rank counts as stopped, or its node as lost, and the run ends."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        _check(self)
        return self


# What settings of different groups must fit together. Each check raises ValueError, naming a setting and what is valid.


def _check(settings: Settings) -> None:
    """Every check that needs neither model nor machine."""
    for each in (
        _check_batch,
        _check_experts,
        _check_routing,
        _check_optimizer,
        _check_pruning,
        _check_asynchrony,
        _check_early_exit,
    ):
        each(settings)


def _check_batch(settings: Settings) -> None:
    b = settings.batch
    if b.prompts_per_update and b.prompts_per_step % b.prompts_per_update:
        nearest_valid = _nearest_divisor(b.prompts_per_step, b.prompts_per_update)
        raise ValueError(
            f"batch.prompts_per_update: {b.prompts_per_update} does not divide prompts_per_step "
            f"{b.prompts_per_step}; the nearest that does is {nearest_valid}"
        )


def _check_experts(settings: Settings) -> None:
    x = settings.experts
    if (x.router_load_balancing_type == "none") != (x.aux_loss_coeff == 0):
        raise ValueError(
            f"experts.aux_loss_coeff: {x.aux_loss_coeff:g} with router_load_balancing_type "
            f"{x.router_load_balancing_type}; valid: 0 with none, above 0 (e.g. 1e-3) with aux_loss or seq_aux_loss"
        )


def _check_routing(settings: Settings) -> None:
    """Of the experts' choice, which auxiliary losses and replay look into."""
    rollout, replay = settings.rollout, settings.rollout.replay_routing
    if (settings.experts.auxiliary or replay) and "moe" in settings.parallel.recomputed:
        raise ValueError(
            "parallel.recompute_modules: moe loses track of the row that auxiliary losses and replayed routing are "
            "of; take it out, or set recompute: full"
        )
    if replay and not (rollout.embedded or rollout.engine == "sglang"):
        engine = {
            "local": "a served local engine does not report its experts",
            "vllm": "vllm reports its experts only with Triton, which no CPU here has, and was never asked for them",
        }[rollout.engine]
        raise ValueError(
            f"rollout.replay_routing: true, but {engine}; set rollout.engine: sglang, or local without "
            "servers.addresses, or false"
        )
    if replay and rollout.partial:
        raise ValueError(
            "rollout.replay_routing: true, but with rollout.partial one completion has the experts of several "
            "weights; set one of them to false"
        )


def _check_optimizer(settings: Settings) -> None:
    o = settings.optimizer
    if o.min_lr > o.lr:
        raise ValueError(f"optimizer.min_lr: {o.min_lr:g} is above lr; at most {o.lr:g}")


def _check_pruning(settings: Settings) -> None:
    p = settings.pruning
    if p.selection == "proportional" and p.sampling == "fixed":
        raise ValueError("pruning.sampling: fixed has one chance for all, proportional one for each; set bernoulli")


def _check_asynchrony(settings: Settings) -> None:
    """Of rollouts that run ahead of training."""
    a, partial = settings.async_steps, settings.rollout.partial
    if a and settings.algorithm.tis_cap is None and settings.algorithm.old_logprobs != "rollout":
        raise ValueError(
            f"algorithm.tis_cap: unset, but with async_steps {a} older weights sample what is trained; set e.g. 2"
        )
    if a > 1 and not partial:
        raise ValueError(
            f"async_steps: {a} needs rollout.partial: true, for a weight update that waits for whole completions "
            "leaves nothing to roll out further ahead; else at most 1"
        )
    if partial and not a:
        raise ValueError("rollout.partial: true does nothing with async_steps 0; set that to 1 or more")


def _check_early_exit(settings: Settings) -> None:
    e, budget = settings.rollout.early_exit, settings.rollout.max_response_tokens
    if e.enabled and not e.markers:
        raise ValueError("rollout.early_exit.markers: [] names no marker; the paper's is ['Wait']")
    if e.enabled and budget - int(e.thinking_share * budget) < 2:
        raise ValueError(
            f"rollout.early_exit.thinking_share: {e.thinking_share} of {budget} tokens "
            "leaves no room for an answer; lower it, e.g. 0.9"
        )


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
