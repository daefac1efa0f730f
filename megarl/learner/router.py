"""The router of a mixture of experts: Megatron's, which also knows the row that passes through it.

With `rollout.replay_routing` the policy's routers choose the experts that the rollout chose, and weigh them by their
own scores. Otherwise rounding could send a token to other experts than in the rollout.

Megatron computes its auxiliary losses over a rank's micro-batch, padding included, and divides by a token count later.
This learner does not divide later. Here the denominator is fixed beforehand: the input tokens of the whole update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megarl.config import Experts, Settings
from megarl.errors import UserError
from megarl.models.shape import ModelShape


@dataclass(slots=True)
class Routing:
    """What the routers must know about a row of t positions on this context-parallel rank."""

    sequence: Tensor  # int64 [t]: each position's sample in the row; -1 = padding
    sequences: int  # in the row
    tokens: int  # input tokens of the whole update, over all rows and ranks
    experts: Tensor | None = None  # int16 [t, layers, top_k] to choose; -1 or None: the router chooses


class Router(TopKRouter):
    """The class that `install` gives Megatron's routers."""

    options: Experts
    row: Routing  # of the current row
    sums: Tensor  # float32 [2]: this rank's part of the load-balancing and the z-loss since `take_losses`

    def routing(self, logits: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        """Logits [t, 1, experts] of this rank's tokens → probabilities and chosen experts (bool), both [t, experts]."""
        probs, chosen = super().routing(logits)
        options = self.options
        if not (self.training and torch.is_grad_enabled() and options.auxiliary):
            return probs, chosen
        logits = logits.flatten(0, 1).float()
        sequence = self._part(self.row.sequence)
        real = sequence >= 0
        balance = z = logits.new_zeros(())
        if options.router_load_balancing_type != "none":
            whole_row = options.router_load_balancing_type == "aux_loss"
            groups = torch.zeros_like(sequence) if whole_row else sequence
            balance = load_balance(
                logits[real].softmax(-1), chosen[real], groups[real], self.row.sequences, self.topk, self.tp_cp_group
            )
        if options.z_loss_coeff:
            z = logits[real].logsumexp(-1).square().sum()
        self.sums += torch.stack([balance, z]).detach() / self.row.tokens
        loss = (options.aux_loss_coeff * balance + options.z_loss_coeff * z) / self.row.tokens
        return MoEAuxLossAutoScaler.apply(probs, loss), chosen

    def _part(self, values: Tensor) -> Tensor:
        """The row's positions that pass through this tensor-parallel rank's router."""
        if not self.config.sequence_parallel:
            return values
        return values.chunk(self.tp_group.size())[self.tp_group.rank()]


class Replay:
    """Megatron's router replay: it returns the experts of the rollout."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, own: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Scores [t, experts] → scores and indices of the `topk` experts to use, both [t, topk]."""
        values, chosen = own(scores, topk, num_groups, group_topk)
        router = self._router
        if router.row.experts is None:
            return values, chosen
        wanted = router._part(router.row.experts[:, router.layer_number - 1]).long()
        chosen = torch.where(wanted >= 0, wanted, chosen)
        return scores.gather(1, chosen), chosen


def replay(chunk: GPTModel) -> None:
    """Make a model chunk's routers choose the experts that rows name."""
    for layer in chunk.decoder.layers:
        layer.mlp.router.router_replay = Replay(layer.mlp.router)


def load_balance(
    scores: Tensor, chosen: Tensor, groups: Tensor, count: int, top_k: int, ranks: dist.ProcessGroup
) -> Tensor:
    """The load-balancing loss (Switch Transformer, arXiv 2101.03961) of each group of tokens times its tokens, summed.

    `scores` and `chosen` [t, E]: the softmax over all experts, and the `top_k` chosen ones. `groups` int64 [t], below
    `count`. A group's loss is E times the sum, over experts, of the expert's share of choices times its mean score: 1
    when balanced. Groups are spread over `ranks`. This is the rank's part; the sum of all parts is the loss.
    """
    experts = scores.shape[1]
    counts = scores.new_zeros(count, experts).index_add(0, groups, chosen.to(scores.dtype))
    if ranks.size() > 1:
        dist.all_reduce(counts, group=ranks)
    tokens = counts.sum(1) / top_k
    mass = scores.new_zeros(count, experts).index_add(0, groups, scores)
    return (experts / top_k * (counts * mass).sum(1) / tokens.clamp(min=1)).sum()


def check(settings: Settings, shape: ModelShape) -> None:
    """Raise UserError, naming the setting and a valid value, for settings that the model's routers cannot follow."""
    experts, parallel = settings.experts, settings.parallel
    if not shape.moe:
        for name in ("aux_loss_coeff", "z_loss_coeff"):
            if value := getattr(experts, name):
                raise UserError(f"experts.{name}: {value:g}: the model has no experts; nearest valid value: 0")
        if settings.rollout.replay_routing:
            raise UserError("rollout.replay_routing: true: the model has no experts; nearest valid value: false")
    elif parallel.tp > 1 and not parallel.uses_sequence_parallel:
        raise UserError(
            f"parallel.sequence_parallel: false: at tp {parallel.tp} Megatron trains experts only with sequence "
            "parallelism; nearest valid value: true"
        )


def install(chunk: GPTModel, options: Experts) -> None:
    """Turn the routers of a model chunk into `Router`s."""
    for layer in chunk.decoder.layers:
        router = layer.mlp.router
        router.__class__ = Router
        router.options = options
        router.sums = torch.zeros(2, device=router.weight.device)
        layer.register_forward_pre_hook(_set_row, with_kwargs=True)


def _set_row(layer: TransformerLayer, _: tuple, arguments: dict[str, Any]) -> None:
    """Give the router its row before each forward pass of the layer, recomputed ones included."""
    layer.mlp.router.row = arguments["packed_seq_params"].routing


def take_losses(chunks: Iterable[GPTModel], layers: int, group: dist.ProcessGroup) -> dict[str, float]:
    """The auxiliary losses since the last call, means over tokens and over the model's `layers` layers. Collective."""
    routers = [layer.mlp.router for chunk in chunks for layer in chunk.decoder.layers]
    sums = torch.stack([router.sums for router in routers]).sum(0).cpu()
    for router in routers:
        router.sums.zero_()
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    balance, z = (sums / layers).tolist()
    return {"load_balance": balance, "z_loss": z}
