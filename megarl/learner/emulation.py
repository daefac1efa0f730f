"""FP8 layers without Transformer Engine: Megatron's parallel linear layers with quantised operands.

The forward product, the input's gradient and the weight's gradient each read operands quantised along the dimension
that they sum over, as in Transformer Engine's kernels. Products accumulate in float32. This tests a recipe's numerics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.learner.quantise import DelayedScale, Recipe, Role, formats, quantise


class Scaling:
    """The recipe of one linear layer, with its amax histories if scaling is delayed."""

    def __init__(self, recipe: Recipe, group: dist.ProcessGroup | None) -> None:
        """`group`: the ranks that share one amax (delayed scaling only)."""
        self.recipe = recipe
        self.group = group
        self.paused = False
        roles = formats(recipe) if recipe == "delayed" else {}
        self.delayed = {role: DelayedScale(fmt) for role, fmt in roles.items()}

    def __call__(self, x: Tensor, role: Role, dim: int) -> Tensor:
        """The matrix `x` as read by a product over its dimension `dim`, in float32."""
        return quantise(x.to(torch.float32), self.recipe, role, dim, self.delayed.get(role))

    def record(self, tensors: dict[Role, Tensor]) -> None:
        """Add the largest magnitudes of `tensors` to the histories. Collective over the group."""
        if not self.delayed:
            return
        amax = torch.stack([tensor.detach().abs().amax().to(torch.float32) for tensor in tensors.values()])
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
        for role, value in zip(tensors, amax.tolist(), strict=True):
            self.delayed[role].record(value)


class Fp8Product(torch.autograd.Function):
    """x [t, k] and w [n, k] → x wᵀ [t, n], forward and backward on quantised operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scaling: Scaling, learning: bool) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.scaling = scaling
        # The backward pass quantises the operands again; delayed scaling then uses these scales.
        ctx.scales = {role: delayed.scale for role, delayed in scaling.delayed.items()}
        y = (scaling(x, "input", 1) @ scaling(w, "weight", 1).T).to(x.dtype)
        if learning:
            scaling.record({"input": x, "weight": w})
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (x, w), scaling = ctx.saved_tensors, ctx.scaling
        with _earlier_scales(scaling, ctx.scales):
            dx = scaling(gradient, "gradient", 1) @ scaling(w, "weight", 0)
            dw = scaling(gradient, "gradient", 0).T @ scaling(x, "input", 0)
        scaling.record({"gradient": gradient})
        return dx.to(x.dtype), dw.to(w.dtype), None, None


@contextmanager
def _earlier_scales(scaling: Scaling, scales: dict[Role, float]) -> Iterator[None]:
    """Inside, inputs and weights are quantised by the scales they had in the forward pass."""
    now = {role: delayed.scale for role, delayed in scaling.delayed.items()}
    for role in now.keys() - {"gradient"}:
        scaling.delayed[role].scale = scales[role]
    try:
        yield
    finally:
        for role, scale in now.items():
            scaling.delayed[role].scale = scale


def emulate(model: GPTModel, recipe: Recipe, first: int, last: int) -> int:
    """Switch the linear layers of transformer layers `first` … `last` (from 1, inclusive) to FP8; returns how many.

    Embedding, output layer and routers stay as they are.
    """
    changed = 0
    for layer in model.decoder.layers:
        if not first <= layer.layer_number <= last:
            continue
        for module in layer.modules():
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                module.fp8_scaling = Scaling(recipe, module.tp_group)
                module._forward_impl = partial(_linear, module.fp8_scaling)
                changed += 1
    return changed


@contextmanager
def paused(model: MegatronModule) -> Iterator[None]:
    """Inside, nothing of `model` is quantised and the amax histories do not change."""
    scalings = [module.fp8_scaling for module in model.modules() if hasattr(module, "fp8_scaling")]
    for scaling in scalings:
        scaling.paused = True
    try:
        yield
    finally:
        for scaling in scalings:
            scaling.paused = False


def _linear(
    scaling: Scaling,
    input: Tensor,  # noqa: A002 (Megatron's name)
    weight: Tensor,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None = None,
    **_: Any,
) -> Tensor:
    """Megatron's `linear_with_grad_accumulation_and_async_allreduce`, on quantised operands. input [t, b, k]."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)  # noqa: A001
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)  # noqa: A001
    # Scoring and the first pass of recomputed layers run without gradients: they only read the histories.
    learning = torch.is_grad_enabled() and weight.requires_grad
    flat = input.reshape(-1, input.shape[-1])
    if scaling.paused or not len(flat):  # the latter: an expert without tokens
        return torch.nn.functional.linear(input, weight, bias)
    y = Fp8Product.apply(flat, weight, scaling, learning).view(*input.shape[:-1], -1)
    return y if bias is None else y + bias
