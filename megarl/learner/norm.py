"""The root-mean-square norm where Transformer Engine is absent.

torch has a fused kernel for CUDA only. On a CPU, torch's norm and its gradient run operator by operator. They read
memory twice as often as this one, and keep one more tensor of the input's size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """Allows sequence parallelism, which Megatron's torch norm refuses: Megatron sums gradients of marked weights."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's own mark

    def forward(self, x: Tensor) -> Tensor:
        """x [..., n] → x / rms(x) * weight, computed in float32."""
        return _Normalise.apply(x, self.weight, self.eps)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = wide * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return (unit * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # y = w u, u = x / rms:  dL/dw = sum g u,  dL/dx = (w g - u mean(w g u)) / rms
        unit, inverse, weight = ctx.saved_tensors
        product = grad * unit
        along = (product @ weight.float()).div_(weight.numel())[..., None]
        grad_weight = product.flatten(0, -2).sum(0)
        grad_x = (grad * weight.float()).addcmul_(unit, along, value=-1).mul_(inverse)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None
