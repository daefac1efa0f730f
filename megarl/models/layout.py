"""Which rank has which part of the model: padding, pipeline placement, local names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megarl.errors import UserError
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Layout:
    """Model-parallel sizes. Data- and context-parallel ranks have copies and do not appear."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # model chunks per pipeline stage
    ep: int = 1
    etp: int | None = None  # tensor-parallel size inside the experts; default: tp, as in Megatron

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    def shards(self, rule: Rule) -> int:
        """The number of ranks that `rule`'s tensor is split over."""
        return self.tp if rule.expert is None else self.expert_tp

    def check(self, shape: ModelShape) -> None:
        """Raise UserError when the model does not divide like this; the message names the nearest size that works."""
        _divides("tp", self.tp, "key/value groups", shape.kv_groups)
        _divides("tp", self.tp, "attention heads", shape.heads)
        if shape.moe is None:
            _divides("tp", self.tp, "MLP width", shape.ffn)
            if self.ep > 1:
                raise UserError(f"ep: {self.ep}: the model has no experts; the only valid value is 1")
        else:
            _divides("ep", self.ep, "experts", shape.moe.count)
            _divides("etp", self.expert_tp, "expert width", shape.moe.ffn)
        if self.vpp > 1 and self.pp == 1:
            raise UserError(f"vpp: {self.vpp}: needs pp > 1; the only valid value for pp 1 is 1")
        _divides("pp", self.pp, "layers", shape.layers)
        _divides("vpp", self.vpp, f"layers of each of {self.pp} pipeline stages", shape.layers // self.pp)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One model chunk of one pipeline stage: Megatron's `GPTModel` with `vp_stage == index`."""

    pp_rank: int
    index: int
    layers: range  # global layer indices
    first: bool  # has the embedding (pre_process)
    last: bool  # has the final norm and the output layer (post_process)


def padded_vocab(vocab: int, tp: int, divisible_by: int = 1) -> int:
    """Vocabulary size padded to a multiple of `divisible_by * tp`, as Megatron's make_vocab_size_divisible_by does."""
    multiple = divisible_by * tp
    return -(-vocab // multiple) * multiple


def chunks(shape: ModelShape, layout: Layout) -> list[Chunk]:
    """Every model chunk, stage by stage. Chunk v of stage p has the (v * pp + p)-th run of layers."""
    layout.check(shape)
    size = shape.layers // (layout.pp * layout.vpp)
    found = []
    for stage in range(layout.pp):
        for index in range(layout.vpp):
            start = (index * layout.pp + stage) * size
            first = stage == index == 0
            last = stage == layout.pp - 1 and index == layout.vpp - 1
            found.append(Chunk(stage, index, range(start, start + size), first, last))
    return found


def local_rules(
    rules: Iterable[Rule], shape: ModelShape, layout: Layout, pp_rank: int = 0, chunk: int = 0, ep_rank: int = 0
) -> dict[str, Rule]:
    """The tensors of one model chunk on one rank: local name → rule.

    The names are exactly those of the chunk's `state_dict()`. Each tensor is split in `layout.shards(rule)` parts; the
    rank has part number tp_rank (of expert rules: its rank in the expert-tensor-parallel group).
    """
    place = chunks(shape, layout)[pp_rank * layout.vpp + chunk]
    experts = shape.moe.count // layout.ep if shape.moe else 0
    mine = range(ep_rank * experts, (ep_rank + 1) * experts)
    return {
        local_name(rule, place, mine): rule
        for rule in rules
        if _has(place, rule) and (rule.expert is None or rule.expert in mine)
    }


def local_name(rule: Rule, chunk: Chunk, experts: range = range(0)) -> str:
    """`rule`'s name in the `state_dict()` of `chunk`, on a rank that has `experts`."""
    name = rule.megatron
    if rule.layer is not None:
        name = name.replace(f"decoder.layers.{rule.layer}.", f"decoder.layers.{rule.layer - chunk.layers.start}.", 1)
    if rule.expert is not None:
        local = rule.expert - experts.start
        name = re.sub(r"(?<=local_experts\.)\d+|(?<=\.weight)\d+$", str(local), name)
    return name


def _has(chunk: Chunk, rule: Rule) -> bool:
    if rule.layer is not None:
        return rule.layer in chunk.layers
    if rule.megatron.startswith("embedding."):
        return chunk.first
    if rule.copy:  # a chunk that has the embedding uses it directly
        return chunk.last and not chunk.first
    return chunk.last


def _divides(setting: str, value: int, what: str, n: int) -> None:
    if n % value:
        best = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - value))
        raise UserError(f"{setting}: {value} does not divide the {n} {what}; nearest valid value: {best}")
