"""Core attention of packed rows in plain torch: rotary embedding, causal attention inside each segment, context
parallelism. Used where Transformer Engine is missing, because Megatron's own attention refuses packing.

Context parallelism cuts every segment into 2 * cp chunks. Rank r has chunks r and 2 * cp - 1 - r: Megatron's zigzag,
which balances causal work. Keys and values are gathered, so each chunk sees all chunks before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megarl.learner.router import Routing


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, and what is computed once for all layers."""

    segments: list[int] = field(default_factory=list)  # lengths over all context-parallel ranks, padding included
    skip_last: bool = False  # the last segment is padding: nothing reads its output
    cos: Tensor | None = None  # [t, 1, head_dim / 2] at this rank's positions; for PackedAttention alone
    sin: Tensor | None = None
    routing: Routing | None = None  # for the routers of a mixture of experts


class PackedAttention(MegatronModule):
    """Megatron's `core_attention`: queries [t, heads, d], keys and values [t, groups, d] → [t, heads, d]."""

    def __init__(self, config: Any, pg_collection: Any, softmax_scale: float, **_: Any) -> None:
        super().__init__(config=config)
        self.cp = pg_collection.cp
        self.scale = softmax_scale
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedRow,
        attn_mask_type: Any = None,
        attention_bias: None = None,
    ) -> Tensor:
        row = packed_seq_params
        query, key = _rotate(query, row), _rotate(key, row)
        size = self.cp.size()
        if size > 1:
            key, value = _gather(torch.stack([key, value], 1), row.segments, self.cp).unbind(1)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, heads, t, d]
        # Split, not sliced: autograd then joins the gradients of all parts once.
        queries = query.split([length // size for length in row.segments], 2)
        keys, values = key.split(row.segments, 2), value.split(row.segments, 2)
        outputs = []
        last = len(row.segments) - 1
        for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
            if i == last and row.skip_last:
                outputs.append(torch.zeros_like(q))
            else:
                outputs.append(self._segment(q, k, v, row.segments[i]))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        return output[0].transpose(0, 1)

    def _segment(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        size = self.cp.size()
        if size == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.grouped)
        chunk = length // (2 * size)
        halves = []
        for half, number in enumerate((self.cp.rank(), 2 * size - 1 - self.cp.rank())):
            end = (number + 1) * chunk
            mask = torch.ones(chunk, end, dtype=torch.bool, device=q.device).tril(end - chunk)
            halves.append(
                F.scaled_dot_product_attention(
                    q[:, :, half * chunk : (half + 1) * chunk],
                    k[:, :, :end],
                    v[:, :, :end],
                    attn_mask=mask,
                    scale=self.scale,
                    enable_gqa=self.grouped,
                )
            )
        return torch.cat(halves, 2)


class _Rotate(torch.autograd.Function):
    """x [t, heads, d] with (x1, x2) = halves of d: (x1 cos - x2 sin, x2 cos + x1 sin). Backward rotates back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    x1, x2 = x.chunk(2, -1)
    out1, out2 = out.chunk(2, -1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin)
    return out


def _rotate(x: Tensor, row: PackedRow) -> Tensor:
    assert row.cos is not None and row.sin is not None
    return _Rotate.apply(x, row.cos.to(x.dtype), row.sin.to(x.dtype))


class _GatherRow(torch.autograd.Function):
    """[t, …] on each context-parallel rank → [cp, t, …] on all; backward sums the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = x.new_empty(group.size(), *x.shape)
        dist.all_gather_into_tensor(out.flatten(0, 1), x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grad[0])
        dist.reduce_scatter_tensor(out, grad.contiguous().flatten(0, 1), group=ctx.group)
        return out, None


def _gather(x: Tensor, segments: list[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's zigzag part [t / cp, …] of every segment → all segments [t, …] in order."""
    size = group.size()
    parts = _GatherRow.apply(x, group)
    ordered = []
    start = 0
    for length in segments:
        chunk = length // (2 * size)
        ordered += [parts[r, start : start + chunk] for r in range(size)]
        ordered += [parts[r, start + chunk : start + 2 * chunk] for r in reversed(range(size))]
        start += length // size
    return torch.cat(ordered)
