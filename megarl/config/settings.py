"""All settings of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megarl.config import checks
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
    collective_deadline: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds a collective between ranks may take before the run ends and says which."""
    heartbeat_deadline: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a sign of life after which a rank counts as stopped, or its node as lost, and the run ends."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        checks.check(self)
        return self
