"""All settings of a run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from megarl.config.algorithm import Algorithm, Pruning, Reward
from megarl.config.data import Batch, Data, Packing
from megarl.config.learner import Checkpoint, Experts, Model, Optimizer, Parallel, Precision
from megarl.config.rollout import Evaluation, Rollout
from megarl.config.section import Natural, Place, Positive, Seconds, Section


class Settings(Section):
    """The settings of a whole run."""

    run: Place
    """The run directory. Resolved settings, metrics, rollouts, checkpoints and the report go there."""
    seed: Natural = 0
    """Seed of data order, sampling, pruning and random weights. The same seed repeats a run."""
    steps: Positive = 100
    """Training steps. Each has one rollout and one or more updates."""
    trackers: list[Literal["wandb", "mlflow"]] = []
    """Services that get the metrics too, after `pip install 'megarl[wandb,mlflow]'`. Their environment variables say
    where, e.g. `WANDB_PROJECT` or `MLFLOW_TRACKING_URI`. A local MLflow database needs the full mlflow package."""
    async_steps: Natural = 0
    """How many steps ahead rollouts may run. With N, no trained token is more than N updates old. 0 is strictly
    on-policy. It needs `algorithm.tis_cap`, and above 1 `rollout.partial`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes. `auto` is what the environment variable MEGARL_DEVICE says, else CUDA if a device is
    visible, else the CPU. On CUDA no two ranks may share a device; too few are refused. `cpu` also keeps the servers
    that megarl starts on the CPU, unless `rollout.servers.device` is `cuda`."""
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
    collective_timeout: Seconds = 1800.0
    """Seconds for one collective between ranks. After that the run ends and names the collective."""
    heartbeat_timeout: Seconds = 300.0
    """Seconds without a sign of life before a rank or its node counts as lost and the run ends."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        _check(self)
        return self

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest request that a run sends to an engine, prompt included."""
        exits = self.rollout.early_exit
        response = max(self.rollout.max_response_tokens, self.evaluation.max_response_tokens or 0)
        # A tokenizer makes at most one token of every byte.
        probe = len(exits.trial_inducer.encode()) + exits.probe_tokens if exits.enabled else 0
        return self.data.max_prompt_tokens + response + probe


# What settings of different groups must fit together. Each check raises ValueError, naming a setting and what is valid.


def _check(settings: Settings) -> None:
    """Every check that needs neither model nor machine."""
    for each in (
        _check_batch,
        _check_experts,
        _check_routing,
        _check_optimizer,
        _check_kl,
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
            f"{b.prompts_per_step}; the nearest valid value is {nearest_valid}"
        )


def _check_experts(settings: Settings) -> None:
    x = settings.experts
    if (x.router_load_balancing_type == "none") != (x.aux_loss_coeff == 0):
        raise ValueError(
            f"experts.aux_loss_coeff: {x.aux_loss_coeff:g} with router_load_balancing_type "
            f"{x.router_load_balancing_type}; valid: 0 with none, above 0 (e.g. 1e-3) with aux_loss or seq_aux_loss"
        )


def _check_routing(settings: Settings) -> None:
    """What auxiliary losses and replayed routing need."""
    rollout, replay = settings.rollout, settings.rollout.replay_routing
    if (settings.experts.auxiliary or replay) and "moe" in settings.parallel.recomputed:
        raise ValueError(
            "parallel.recompute_modules: moe hides the row that auxiliary losses and replayed routing need; remove it, "
            "or set recompute: full"
        )
    if replay and not (rollout.embedded or rollout.engine == "sglang"):
        engine = {
            "local": "a served local engine does not report its experts",
            "vllm": "vllm reports its experts only with Triton, and megarl does not read them",
        }[rollout.engine]
        raise ValueError(
            f"rollout.replay_routing: true, but {engine}; set it to false, or set rollout.engine: sglang, or local "
            "without servers.addresses"
        )
    if replay and rollout.partial:
        raise ValueError(
            "rollout.replay_routing: true, but with rollout.partial several weights choose the experts of one "
            "completion; set one of the two to false"
        )


def _check_optimizer(settings: Settings) -> None:
    o = settings.optimizer
    if o.min_lr > o.lr:
        raise ValueError(f"optimizer.min_lr: {o.min_lr:g} is above lr; set at most {o.lr:g}")


def _check_kl(settings: Settings) -> None:
    kl = settings.algorithm.kl
    if kl.coef and kl.estimator == "k1" and kl.apply_to == "loss":
        raise ValueError(
            "algorithm.kl.estimator: k1 as a loss has no gradient in expectation and adds only noise; set k2 or k3, or "
            "apply_to: reward"
        )


def _check_pruning(settings: Settings) -> None:
    p = settings.pruning
    if p.selection == "proportional" and p.sampling == "fixed":
        raise ValueError("pruning.sampling: fixed cannot go with selection proportional; set bernoulli")


def _check_asynchrony(settings: Settings) -> None:
    """What rollouts that run ahead of training need."""
    a, partial = settings.async_steps, settings.rollout.partial
    if a and settings.algorithm.tis_cap is None and settings.algorithm.old_logprobs != "rollout":
        raise ValueError(
            f"algorithm.tis_cap: unset, but with async_steps {a} older weights sample the completions; set e.g. 2"
        )
    if a > 1 and not partial:
        raise ValueError(
            f"async_steps: {a} needs rollout.partial: true; without it weight updates wait for whole completions, and "
            "at most 1 is possible"
        )
    if partial and not a:
        raise ValueError("rollout.partial: true does nothing with async_steps 0; set async_steps to 1 or more")


def _check_early_exit(settings: Settings) -> None:
    e, budget = settings.rollout.early_exit, settings.rollout.max_response_tokens
    if e.enabled and budget - int(e.thinking_share * budget) < 2:
        raise ValueError(
            f"rollout.early_exit.thinking_share: {e.thinking_share} of {budget} tokens "
            "leaves no room for an answer; set a lower share, e.g. 0.9"
        )


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
