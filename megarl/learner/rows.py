"""From samples to packed rows: padding, context-parallel parts, and the sums over sequences that the losses need."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config import Parallel, Precision
from megarl.learner.attention import PackedRow
from megarl.learner.precision import row_multiple
from megarl.learner.router import Routing
from megarl.types import MicroBatch, Sample


@dataclass(frozen=True, slots=True)
class Alignment:
    """The numbers that lengths must be multiples of."""

    sample: int  # of every sample, so that context parallelism can cut it into 2 * cp chunks
    row: int  # of the row, so that all ranks have equal parts (sequence parallelism, FP8)

    @classmethod
    def of(cls, parallel: Parallel, precision: Precision, tokens_per_row: int) -> Alignment:
        sample = 2 * parallel.cp if parallel.cp > 1 else 1
        split = parallel.uses_sequence_parallel
        per_rank = (parallel.tp if split else 1) * row_multiple(precision, split)
        row = math.lcm(sample, parallel.cp * per_rank)
        return cls(sample, _up(tokens_per_row, row) if parallel.overlap_tp else row)

    def row_length(self, samples: Sequence[Sample]) -> int:
        """Positions of a row with these samples; at least the smallest row."""
        used = sum(_up(sample.input_length, self.sample) for sample in samples)
        return max(_up(used, self.row), self.row)


Ranges = list[tuple[int, Tensor, Tensor]]
"""Per sample: its index, entries of `Row.scored`, their response positions."""


@dataclass(slots=True)
class Row:
    """One micro-batch as this rank computes it."""

    micro: MicroBatch  # this context-parallel rank's positions
    packed: PackedRow
    scored: Tensor  # int64 [n]: positions that predict a response token
    ranges: Ranges


def build_row(
    ids: Sequence[int],
    samples: Sequence[Sample],
    length: int,
    alignment: Alignment,
    frequencies: Tensor | None,
    cp_rank: int = 0,
    cp_size: int = 1,
    device: torch.device | None = None,
    routed_tokens: int | None = None,
) -> Row:
    """Pack `samples` (with indices `ids` in the batch) into a row of `length` positions; returns this rank's part.

    Every sample is padded to `alignment.sample`. The rest of the row is one more segment, which trains nothing.
    `frequencies`: `rope.rotary`'s, [head_dim / 2]; None where Transformer Engine rotates. `routed_tokens`:
    `Routing.tokens`; None without experts.
    """
    segments = [_up(sample.input_length, alignment.sample) for sample in samples]
    if sum(segments) < length:
        segments.append(length - sum(segments))
    bounds = np.cumsum([0, *segments])
    columns = _columns(samples, bounds, length)
    local = _zigzag(segments, cp_rank, cp_size)
    tensors = {name: torch.from_numpy(values if local is None else values[local]) for name, values in columns.items()}
    response, real = tensors.pop("response"), tensors.pop("real")
    scored = (response >= 0).nonzero().squeeze(1)
    position, sequence = response[scored], tensors["sequence"][scored]
    ranges = [(i, (entries := (sequence == k).nonzero().squeeze(1)), position[entries]) for k, i in enumerate(ids)]
    cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    angles = None if frequencies is None else torch.outer(tensors["positions"].float(), frequencies)[:, None]
    micro = MicroBatch(**tensors, cu_seqlens=cu_seqlens, sample_ids=list(ids))
    routing = None
    if routed_tokens is not None:
        given = _experts(samples, bounds, length)
        experts = None if given is None else torch.from_numpy(given if local is None else given[local])
        routing = Routing(torch.where(real, tensors["sequence"], -1), len(samples), routed_tokens, experts)
    packed = PackedRow(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max(segments),
        max_seqlen_kv=max(segments),
        segments=segments,
        skip_last=len(segments) > len(samples) > 0,
        cos=None if angles is None else angles.cos(),
        sin=None if angles is None else angles.sin(),
        routing=routing,
    )
    row = Row(micro, packed, scored, ranges)
    return row if device is None or device.type == "cpu" else _to(row, device)


def sequence_sum(micro: MicroBatch, group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """A function [T] → [T]: at each position, the sum of `values` over its sequence on all context-parallel ranks.

    It is differentiable. Every rank of the group must call it equally often.
    """
    count = len(micro.cu_seqlens)  # at least the number of sequences

    def total(values: Tensor) -> Tensor:
        sums = values.new_zeros(count).index_add(0, micro.sequence, values)
        if group.size() > 1:
            sums = _SumOverRanks.apply(sums, group)
        return sums[micro.sequence]

    return total


class _SumOverRanks(torch.autograd.Function):
    """All-reduce forward and backward: every rank's loss depends on every rank's summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _columns(samples: Sequence[Sample], bounds: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """The row's arrays [length].

    `response` is the index of the response token predicted at a position, or -1; `real` is False for padding.
    """
    columns: dict[str, np.ndarray] = {
        "tokens": np.zeros(length, np.int64),
        "labels": np.zeros(length, np.int64),
        "positions": np.zeros(length, np.int64),
        "sequence": np.full(length, len(samples), np.int64),
        "scale": np.zeros(length, np.float32),
        "advantage": np.zeros(length, np.float32),
        "sampled": np.zeros(length, bool),
        "rollout_logprobs": np.full(length, np.nan, np.float32),
        "old_logprobs": np.full(length, np.nan, np.float32),
        "ref_logprobs": np.full(length, np.nan, np.float32),
        "response": np.full(length, -1, np.int64),
        "real": np.zeros(length, bool),
    }
    for k, sample in enumerate(samples):
        start, n = bounds[k], sample.input_length
        whole, used = slice(start, bounds[k + 1]), slice(start, start + n)
        columns["tokens"][used] = sample.token_ids[:-1]
        columns["labels"][used] = sample.token_ids[1:]
        columns["positions"][whole] = np.arange(bounds[k + 1] - start)
        columns["sequence"][whole] = k
        columns["real"][used] = True
        scored = slice(start + sample.response_start - 1, start + n)
        columns["response"][scored] = np.arange(len(sample.token_ids) - sample.response_start)
        columns["scale"][scored] = sample.scale
        columns["advantage"][scored] = sample.advantage
        columns["sampled"][scored] = True if sample.sampled is None else sample.sampled
        for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
            values = getattr(sample, name)
            if values is not None:
                columns[name][scored] = values
    if len(bounds) > len(samples) + 1:
        columns["positions"][bounds[-2] :] = np.arange(bounds[-1] - bounds[-2])
    return columns


def _experts(samples: Sequence[Sample], bounds: np.ndarray, length: int) -> np.ndarray | None:
    """Experts of the row's positions, int16 [length, layers, top_k], -1 where not given; None if no sample has any."""
    shapes = {sample.experts.shape[1:] for sample in samples if sample.experts is not None}
    if not shapes:
        return None
    row = np.full((length, *shapes.pop()), -1, np.int16)
    for sample, start in zip(samples, bounds, strict=False):
        if sample.experts is not None:
            row[start : start + sample.input_length] = sample.experts
    return row


def _zigzag(segments: Sequence[int], rank: int, size: int) -> np.ndarray | None:
    """Row positions of this context-parallel rank: chunks `rank` and `2 * size - 1 - rank` of every segment."""
    if size == 1:
        return None
    parts = []
    start = 0
    for length in segments:
        chunk = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
        start += length
    return np.concatenate(parts)


def _to(row: Row, device: torch.device) -> Row:
    """Each tensor moved once, from pinned memory, so that the host need not wait.

    Names of one tensor stay names of one: Transformer Engine compares the `cu_seqlens` in every layer, and only of one
    tensor can it tell without waiting for the device.
    """
    moved: dict[int, Tensor] = {}

    def there(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            source = tensor.pin_memory() if device.type == "cuda" else tensor
            moved[id(tensor)] = source.to(device, non_blocking=True)
        return moved[id(tensor)]

    parts: list[MicroBatch | PackedRow | Routing] = [row.micro, row.packed]
    if row.packed.routing:
        parts.append(row.packed.routing)
    for part in parts:
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                setattr(part, field.name, there(value))
    row.scored = there(row.scored)
    return row


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
