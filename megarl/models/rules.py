"""One rule makes one Megatron tensor from Hugging Face tensors, and takes it apart again.

Every rule does two things: it slices each Hugging Face tensor for one tensor-parallel rank, then it fuses the slices.
The unsharded tensor is the shard of a group of one. So conversion, sharded loading and gathering share one path, and
each step has an exact inverse. All functions accept any dtype and device, gradients and meta tensors included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.models.shape import Experts, ModelShape

Spec = Literal["local", "te"]


@dataclass(frozen=True, slots=True)
class Part:
    """A Hugging Face tensor that is part of a Megatron tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron tensor (`megatron`: its name with global layer and expert indices) and its parts.

    The parts are interleaved along dim 0 in `groups` groups: group g of every part, in the order of the parts, then
    group g + 1. Query/key/value have one group per key/value head, gate/up have one group.
    A shard contains the matching slice of every part. So a shard of gate/up is [gate_r | up_r].
    """

    megatron: str
    parts: tuple[Part, ...]
    partition: int | None = None  # dim split over tensor-parallel ranks: None = replicated, 0 = column, 1 = row
    groups: int = 1
    rows: int | None = None  # dim 0 after vocabulary padding; None = no padding
    layer: int | None = None  # global layer index
    expert: int | None = None  # global expert index; such tensors are split over expert-tensor-parallel ranks
    copy: bool = False  # a second copy of `parts` (output layer of tied embeddings); never written back

    @property
    def hf(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors."""
        return tuple(part.name for part in self.parts)

    @property
    def gate_up(self) -> bool:
        """Whether shards interleave their parts rank by rank, so that concatenated shards are not the full tensor."""
        return self.partition == 0 and len(self.parts) > 1 and self.groups == 1

    def shape(self, size: int = 1) -> tuple[int, ...]:
        """Shape of one of `size` shards; by default of the full tensor."""
        first, *rest = self.parts[0].shape
        first = self.rows or sum(part.shape[0] for part in self.parts)
        dims = [first, *rest]
        if self.partition is not None:
            self._check(size)
            dims[self.partition] //= size
        return tuple(dims)

    def slices(self, rank: int = 0, size: int = 1) -> dict[str, tuple[slice, ...]]:
        """What shard `rank` of `size` needs of each Hugging Face tensor: name → index, in memory or on disk.

        Slices of the padded vocabulary end where the real vocabulary ends, so they may be empty.
        """
        self._check(size)
        found = {}
        for part in self.parts:
            index = [slice(0, n) for n in part.shape]
            if self.partition is not None:
                n = part.shape[self.partition]
                step = (self.rows or n) // size if self.partition == 0 else n // size
                index[self.partition] = slice(min(rank * step, n), min((rank + 1) * step, n))
            found[part.name] = tuple(index)
        return found

    def fuse(self, parts: Mapping[str, Tensor], size: int = 1) -> Tensor:
        """One of `size` shards (default: the full tensor) from its slices of the Hugging Face tensors, by name.

        Vocabulary padding is zeros. A rule with one part and no padding returns that tensor itself.
        """
        blocks, rows = self.blocks(parts, size), self.shape(size)[0]
        if self.rows is not None and len(blocks[0]) < rows:
            blocks.append(blocks[0].new_zeros(rows - len(blocks[0]), *blocks[0].shape[1:]))
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]

    def blocks(self, parts: Mapping[str, Tensor], size: int = 1) -> list[Tensor]:
        """The rows of `fuse(parts, size)` in order, as views of the parts, without padding."""
        pieces = [parts[part.name] for part in self.parts]
        if len(pieces) == 1:
            return pieces
        groups = self._groups(size)
        return [rows for group in zip(*(piece.chunk(groups) for piece in pieces), strict=True) for rows in group]

    def rows_of(self, shard: Tensor, rank: int = 0, size: int = 1) -> dict[str, Sequence[Tensor]]:
        """The rows of each part in shard `rank` of `size`, as views in order, without padding. Inverts `blocks`."""
        groups = self._groups(size)
        heights = {name: (i[0].stop - i[0].start) // groups for name, i in self.slices(rank, size).items()}
        blocks = shard[: groups * sum(heights.values())].split([*heights.values()] * groups)
        return {name: blocks[number :: len(heights)] for number, name in enumerate(heights)}

    def split(self, full: Tensor) -> dict[str, Tensor]:
        """The Hugging Face tensors inside a full Megatron tensor, without padding. Views where possible."""
        return {
            part.name: piece[: part.shape[0]] for part, piece in zip(self.parts, self._pieces(full, 1), strict=True)
        }

    def shard(self, full: Tensor, rank: int, size: int) -> Tensor:
        """Shard `rank` of `size` of a full Megatron tensor. A view unless `gate_up`."""
        self._check(size)
        if self.partition is None or size == 1:
            return full
        if not self.gate_up:
            return full.chunk(size, self.partition)[rank]
        return torch.cat([piece.chunk(size)[rank] for piece in self._pieces(full, 1)])

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The full Megatron tensor from all its shards in rank order. Of a replicated tensor: the first."""
        size = len(shards)
        self._check(size)
        if self.partition is None or size == 1:
            return shards[0]
        if not self.gate_up:
            return torch.cat(list(shards), self.partition)
        by_part = zip(*(self._pieces(shard, size) for shard in shards), strict=True)
        return torch.cat([piece for pieces in by_part for piece in pieces])

    def _pieces(self, tensor: Tensor, size: int) -> list[Tensor]:
        """The slice of every part in a shard; padding stays."""
        if len(self.parts) == 1:
            return [tensor]
        groups = self._groups(size)
        heights = [part.shape[0] // size // groups for part in self.parts]
        grouped = tensor.unflatten(0, (groups, sum(heights)))
        return [piece.flatten(0, 1) for piece in grouped.split(heights, 1)]

    def _groups(self, size: int) -> int:
        return max(1, self.groups // size)

    def _check(self, size: int) -> None:
        if self.partition is None:
            return
        for part in self.parts:
            n = self.rows if self.rows is not None and self.partition == 0 else part.shape[self.partition]
            if n % size:
                raise UserError(
                    f"{self.megatron}: dim {self.partition} of {part.name}, {n}, is not divisible by {size}"
                )
        if self.groups > 1 and self.groups % size:
            raise UserError(f"{self.megatron}: {self.groups} key/value groups cannot be split over {size} ranks")


# ── Makers of the rules in a family's table. Each takes two names; `{x}` in the second stands for several parts. ──

Maker = Callable[["ModelShape"], Rule]


def norm(megatron: str, hf: str) -> Maker:
    """A norm's weight [hidden], on every rank."""
    return lambda shape: Rule(megatron, (Part(hf, (shape.hidden,)),))


def head_norm(megatron: str, hf: str) -> Maker:
    """A norm's weight [head_dim], shared by all heads and ranks."""
    return lambda shape: Rule(megatron, (Part(hf, (shape.head_dim,)),))


def vocabulary(megatron: str, hf: str, copy: bool = False) -> Maker:
    """[vocab, hidden], padded and split by rows. `copy`: the tied output layer of the last pipeline stage."""
    return lambda shape: Rule(
        megatron, (Part(hf, (shape.vocab, shape.hidden)),), partition=0, rows=shape.vocab, copy=copy
    )


def qkv(megatron: str, hf: str, bias: bool = False) -> Maker:
    """Queries, keys and values, fused group by group: the group's queries, its key, its value."""

    def make(shape: ModelShape) -> Rule:
        heads = {"q": shape.heads, "k": shape.kv_groups, "v": shape.kv_groups}
        columns = () if bias else (shape.hidden,)
        parts = tuple(Part(hf.format(x=x), (n * shape.head_dim, *columns)) for x, n in heads.items())
        return Rule(megatron, parts, partition=0, groups=shape.kv_groups)

    return make


def attention_output(megatron: str, hf: str) -> Maker:
    """[hidden, heads * head_dim], split by columns."""
    return lambda shape: Rule(megatron, (Part(hf, (shape.hidden, shape.heads * shape.head_dim)),), partition=1)


def gate_up(megatron: str, hf: str) -> Maker:
    """Gate and up projections of the dense MLP, [ffn, hidden] each."""
    return lambda shape: Rule(megatron, _gate_up(hf, shape.ffn, shape.hidden), partition=0)


def down(megatron: str, hf: str) -> Maker:
    """[hidden, ffn], split by columns."""
    return lambda shape: Rule(megatron, (Part(hf, (shape.hidden, shape.ffn)),), partition=1)


def router(megatron: str, hf: str) -> Maker:
    """[experts, hidden], on every rank."""
    return lambda shape: Rule(megatron, (Part(hf, (_moe(shape).count, shape.hidden)),))


def expert_gate_up(megatron: str, hf: str) -> Maker:
    """Gate and up projections of one expert, [expert ffn, hidden] each."""
    return lambda shape: Rule(megatron, _gate_up(hf, _moe(shape).ffn, shape.hidden), partition=0)


def expert_down(megatron: str, hf: str) -> Maker:
    """[hidden, expert ffn], split by columns."""
    return lambda shape: Rule(megatron, (Part(hf, (shape.hidden, _moe(shape).ffn)),), partition=1)


def _moe(shape: ModelShape) -> Experts:
    assert shape.moe is not None, f"{shape.family} has expert rules, so its shape has experts"
    return shape.moe


def _gate_up(hf: str, ffn: int, hidden: int) -> tuple[Part, ...]:
    return tuple(Part(hf.format(x=x), (ffn, hidden)) for x in ("gate", "up"))


def prefixed(rule: Rule, megatron: str, hf: str, layer: int, expert: int | None = None) -> Rule:
    """`rule` as the tensor of one layer, or of one expert of it, under the prefixes `megatron` and `hf`."""
    parts = tuple(Part(hf + part.name, part.shape) for part in rule.parts)
    return replace(rule, megatron=megatron + rule.megatron, parts=parts, layer=layer, expert=expert)
