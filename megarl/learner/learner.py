"""The learner: one optimizer update from a batch, log-probs of a batch, and the weights, on all ranks together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import tee
from operator import attrgetter
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarl.algorithms.metrics import summarise
from megarl.config import Settings
from megarl.errors import RunError
from megarl.learner import precision as precisions
from megarl.learner import router
from megarl.learner.broadcast_batch import broadcast
from megarl.learner.model import build, spec_kind, transformer_config, unquantised, unwrap, user_buffers
from megarl.learner.parallel import World, check
from megarl.learner.rows import Alignment, Ranges, Row, build_row, sequence_sum
from megarl.learner.schedule import learning_rate
from megarl.learner.weights import Weights
from megarl.models.config_json import read_shape
from megarl.models.rope import rotary
from megarl.models.shape import ModelShape
from megarl.types import Batch, MicroBatch

log = logging.getLogger(__name__)


class Objective(Protocol):
    """The loss of one row, without side effects; see algorithms/loss.py."""

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        micro: MicroBatch,
        sequence_sum: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs and entropies [T] (0 where no response token is predicted) → loss, and sums for the metrics.

        Loss and sums are added over rows and ranks; of sums named `*_max` the maximum is taken.
        """
        ...


def sft_objective(
    logprobs: Tensor, entropy: Tensor, micro: MicroBatch, sequence_sum: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised fine-tuning: the negative log-likelihood of the responses, each token times its scale."""
    learned = micro.scale != 0
    loss = -(micro.scale * logprobs).sum()
    sums = {"loss": loss, "tokens": learned.sum(), "nll": -logprobs[learned].sum(), "entropy": entropy[learned].sum()}
    return loss, {name: value.detach().float() for name, value in sums.items()}


class Learner:
    """A policy, its optimizer and, with a KL term, the frozen reference. Every method is collective."""

    def __init__(self, settings: Settings, world: World, total_updates: int) -> None:
        """Build the model of `settings.model.path`/config.json, with weights from its safetensors or from the seed."""
        self.settings = settings
        self.world = world
        self.total_updates = total_updates
        self.version = 0
        chosen = precisions.recipe(settings.precision)
        if precisions.emulated(settings.precision) and world.is_controller:
            log.warning("FP8 (%s) is emulated on this CPU: its numerics, not its speed", chosen)
        self.shape: ModelShape = read_shape(settings.model.path)
        check(settings.parallel, self.shape)
        precisions.check_layers(settings.precision, self.shape.layers, settings.parallel.pp)
        router.check(settings, self.shape)
        self.config = transformer_config(self.shape, settings.parallel, settings.precision, settings.experts)
        self.frequencies = rotary(self.shape).frequencies if spec_kind() == "local" else None
        self.alignment = Alignment.of(settings.parallel, settings.precision, settings.batch.tokens_per_row)
        self.temperature = settings.rollout.temperature
        if settings.parallel.overlap_tp:
            user_buffers(self.config, self.alignment.row)
        chunks, self.weights = self._filled()
        if settings.rollout.replay_routing:
            for chunk in chunks:
                router.replay(unwrap(chunk))
        self.models = self._distributed(chunks)
        self.optimizer = get_megatron_optimizer(self._optimizer_config(), self.models, use_gloo_process_groups=False)
        self.reference = self._frozen() if settings.algorithm.kl.coef > 0 else None

    def train_step(self, batch: Batch | None, objective: Objective) -> dict[str, float]:
        """One optimizer update from rank 0's batch (None elsewhere); returns its metrics, equal on every rank.

        The loss is the sum of `objective` over all rows. algorithms/metrics.py turns its sums into metrics. `grad_norm`
        (before clipping) and `lr` are added. Raises RunError when the gradient is not finite.
        """
        batch = broadcast(batch, self.world)
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = self._run(self.models, batch, partial(self._loss, objective))
        rate = self._set_optimizer()
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise RunError(f"update {self.version}: the gradient norm is {grad_norm}")
        self.version += 1
        metrics = {**_metrics(self._total(parts)), "grad_norm": float(grad_norm), "lr": rate}
        if self.settings.experts.auxiliary:
            chunks = [unwrap(model) for model in self.models]
            metrics |= router.take_losses(chunks, self.shape.layers, self.world.control)
        return metrics

    @torch.no_grad()
    def logprobs(
        self,
        batch: Batch | None,
        which: Literal["policy", "reference"],
        temperature: float | None = None,
        quantised: bool = True,
    ) -> dict[int, np.ndarray]:
        """Log-probs of the response tokens: sample index → float32 [n], for the samples in rank 0's `batch.rows`.

        Complete on rank 0; other ranks get an empty dict. `temperature`: default the sampling temperature.
        `quantised`: False computes in bf16 where the precision is FP8, as rollout engines do.
        """
        batch = broadcast(batch, self.world)
        models = self.models if which == "policy" else self.reference
        if models is None:
            raise ValueError("there is no reference model: algorithm.kl.coef is 0")
        used = sorted({i for rank in batch.rows for row in rank for i in row})
        lengths = [len(batch.samples[i].token_ids) - batch.samples[i].response_start for i in used]
        starts = dict(zip(used, np.cumsum([0, *lengths[:-1]]), strict=True)) if used else {}
        flat = torch.zeros(sum(lengths))
        with nullcontext() if quantised else unquantised(models, self.config):
            rows = self._run(models, batch, _scores, temperature, forward_only=True)
        if self.world.tp_rank != 0:
            rows = []
        for ranges, values in rows:
            for i, entries, positions in ranges:
                flat[positions + int(starts[i])] = values[0, entries].cpu()
        if self.world.world_size > 1:
            dist.reduce(flat, 0, group=self.world.control)
        if not self.world.is_controller:
            return {}
        return {i: flat[starts[i] : starts[i] + n].numpy() for i, n in zip(used, lengths, strict=True)}

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's full tensors under Hugging Face's names, streamed from the shards to every rank.

        Every rank must iterate to the end. A tensor is valid until the next one is asked for.
        """
        if self.world.world_size > 1:  # engines may finish rollouts first, for longer than a collective may take
            self.world.barrier("the weights to be asked for")
        self.finish_parameter_gather()
        yield from self.weights.stream(lambda parameter: parameter.data)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Like `named_tensors`, for the float32 gradients of the last `accumulate`, summed over all ranks."""
        if self.settings.parallel.distributed_optimizer:
            for model in self.models:
                for buffer in model.buffers + model.expert_parallel_buffers:
                    _gather_shards(buffer)
        yield from self.weights.stream(attrgetter("main_grad"))  # Megatron adds it to its parameters

    def accumulate(self, batch: Batch | None, objective: Objective) -> dict[str, float]:
        """`train_step` without the update: keeps gradients for `named_gradients`; returns the sums and `grad_norm`."""
        batch = broadcast(batch, self.world)
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._total(self._run(self.models, batch, partial(self._loss, objective)))
        self.optimizer.prepare_grads()
        return {**sums, "grad_norm": float(self.optimizer.get_grad_norm())}

    def finish_parameter_gather(self) -> None:
        """Wait for the parameters: with overlap, Megatron gathers updated ones only when the model first uses them."""
        if self.settings.parallel.overlap_grad_reduce and self.settings.parallel.distributed_optimizer:
            for model in self.models:
                model.start_param_sync(force_sync=True)

    def _set_optimizer(self) -> float:
        """Give the optimizer this update's learning rate, which is returned, and the run's own settings.

        A checkpoint brings the settings that it was saved with. Norms and biases have no weight decay: Megatron marks
        them, and its scheduler, whose place this takes, would read the mark.
        """
        settings = self.settings.optimizer
        rate = learning_rate(self.version, self.total_updates, settings)
        for group in self.optimizer.param_groups:
            decay = settings.weight_decay * group["wd_mult"]
            group.update(lr=rate, weight_decay=decay, betas=settings.betas, eps=settings.eps)
        return rate

    def _filled(self) -> tuple[list[torch.nn.Module], Weights]:
        """New model chunks with the initial weights, and the map of their parameters."""
        chunks = build(self.shape, self.config, self.settings.precision, self.settings.experts)
        weights = Weights(self.shape, [unwrap(chunk) for chunk in chunks], self.world)
        if self.settings.model.weights == "random":
            weights.draw(self.settings.seed, self.shape.initial_std)
        else:
            weights.read(self.settings.model.path)
        return chunks, weights

    def _frozen(self) -> list[torch.nn.Module]:
        chunks, _ = self._filled()
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        return chunks

    def _distributed(self, chunks: list[torch.nn.Module]) -> list[DistributedDataParallel]:
        parallel = self.settings.parallel
        overlap = parallel.overlap_grad_reduce
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and parallel.distributed_optimizer,
        )
        models = [
            DistributedDataParallel(self.config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        if overlap:
            one = len(models) == 1
            self.config.no_sync_func = models[0].no_sync if one else [model.no_sync for model in models]
            self.config.grad_sync_func = models[0].start_grad_sync if one else [m.start_grad_sync for m in models]
        self.config.finalize_model_grads_func = _finalize
        return models

    def _optimizer_config(self) -> OptimizerConfig:
        settings, parallel = self.settings.optimizer, self.settings.parallel
        dtype = precisions.parameter_dtype(self.settings.precision)
        return OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=parallel.overlap_grad_reduce and parallel.distributed_optimizer,
            # Megatron's hybrid optimizer takes its gradients the precision-aware way.
            use_precision_aware_optimizer=parallel.offload_optimizer > 0,
            optimizer_cpu_offload=parallel.offload_optimizer > 0,
            optimizer_offload_fraction=parallel.offload_optimizer,
        )

    def _run(
        self,
        models: list[torch.nn.Module],
        batch: Batch,
        loss: Callable[[Row, Tensor], Any],
        temperature: float | None = None,
        forward_only: bool = False,
    ) -> list[Any]:
        """Megatron's schedule over this rank's rows; on last stages, returns what `loss` returned for each row."""
        plan, lengths = self._plan(batch)
        rows = self._rows(batch, plan, lengths)
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward, loss, temperature or self.temperature),
            data_iterator=list(tee(rows, len(models))) if len(models) > 1 else rows,
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(plan),
            seq_length=lengths[0],
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _plan(self, batch: Batch) -> tuple[list[list[int]], list[int]]:
        """This data-parallel rank's rows: the samples in each, and its length over all context-parallel ranks."""
        parallel = self.settings.parallel
        plan = list(batch.rows[self.world.dp_rank])
        multiple = parallel.pp if parallel.vpp > 1 else 1  # the interleaved schedule takes whole rounds
        plan += [[]] * (-len(plan) % multiple)
        lengths = [self.alignment.row_length([batch.samples[i] for i in ids]) for ids in plan]
        if parallel.pp > 1:  # stages agree on shapes beforehand
            lengths = [max(lengths)] * len(lengths)
        return plan, lengths

    def _rows(self, batch: Batch, plan: list[list[int]], lengths: list[int]) -> Iterator[Row]:
        """This rank's part of each row, made when it is asked for: a GPU computes one while the next one is made."""
        here = self.world.cp_rank, self.settings.parallel.cp, self.world.device
        tokens = sum(batch.samples[i].input_length for rank in batch.rows for ids in rank for i in ids)
        routed = tokens if self.shape.moe else None
        for ids, length in zip(plan, lengths, strict=True):
            samples = [batch.samples[i] for i in ids]
            yield build_row(ids, samples, length, self.alignment, self.frequencies, *here, routed)

    def _forward(
        self, loss: Callable[[Row, Tensor], Any], temperature: float, rows: Iterator[Row], model: torch.nn.Module
    ) -> Any:
        """Megatron's forward step."""
        row = next(rows)
        micro = row.micro
        output = model(
            micro.tokens,
            micro.positions,
            row=row.packed,
            targets=micro.labels[row.scored],
            scored=row.scored,
            temperature=temperature,
        )
        return output, partial(loss, row)

    def _loss(self, objective: Objective, row: Row, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        whole = output.new_zeros(2, len(row.micro.tokens)).index_copy(1, row.scored, output)
        total = sequence_sum(row.micro, parallel_state.get_context_parallel_group())
        loss, sums = objective(whole[0], whole[1], row.micro, total)
        return loss, torch.ones((), dtype=torch.int), {"loss": loss.detach(), **sums}

    def _total(self, parts: list[dict[str, Tensor]]) -> dict[str, float]:
        """The sums over all rows of all ranks, on every rank."""
        metrics: dict[str, float] = {}
        if self.world.last_stage:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            names = sorted(parts[0])
            stacked = torch.stack([torch.stack([part[name] for name in names]) for part in parts]).double()
            peak = torch.tensor([name.endswith("_max") for name in names], device=stacked.device)
            values = torch.where(peak, stacked.amax(0), stacked.sum(0))
            if group.size() > 1:
                every = values.new_empty(group.size(), len(names))
                dist.all_gather_into_tensor(every, values[None], group=group)
                values = torch.where(peak, every.amax(0), every.sum(0))
            metrics = dict(zip(names, values.tolist(), strict=True))
        if self.settings.parallel.pp > 1:
            box = [metrics]
            dist.broadcast_object_list(box, self.world.world_size - 1, group=self.world.control)
            metrics = box[0]
        return metrics


def _finalize(
    models: list[torch.nn.Module], num_tokens: Tensor | None, pg_collection: Any = None, force_all_reduce: bool = False
) -> None:
    """Megatron's gradient reductions without its division by a token count: the loss already has its denominator."""
    finalize_model_grads(models, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


def _gather_shards(buffer: Any) -> None:
    """Complete a gradient buffer: the distributed optimizer's reduce-scatter left each rank one shard."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
        dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """For the policy loss, `summarise`. For another objective, the loss, and each other sum over its `tokens`."""
    if "policy_loss" in sums:
        return summarise(sums)
    tokens = sums.pop("tokens")
    means = {name: value / max(tokens, 1.0) for name, value in sums.items() if name != "loss"}
    return {"loss": sums["loss"], "tokens_trained": tokens, **means}


def _scores(row: Row, output: Tensor, non_loss_data: bool = True) -> tuple[Ranges, Tensor]:
    return row.ranges, output
