"""The model's tensors by Hugging Face's names: filled from files or from a seed, and streamed from the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from megarl.learner.model import PolicyModel, spec_kind, vocabulary_rows
from megarl.learner.parallel import World
from megarl.models.families import rules as family_rules
from megarl.models.files.hf import HfWeights, load_shards
from megarl.models.layout import local_rules
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape
from megarl.types import derive_seed

BUCKET_BYTES = 1 << 26  # of full tensors gathered at a time


@dataclass(frozen=True, slots=True)
class Place:
    """The ranks that have a tensor: a pipeline stage, and for an expert's tensor an expert-parallel rank."""

    stage: int
    expert_rank: int | None


class Weights:
    """The map between this rank's parameters and the whole model."""

    def __init__(self, shape: ModelShape, chunks: list[PolicyModel], world: World) -> None:
        self.world = world
        self.layout = world.layout
        self.rules = family_rules(shape, spec_kind(), vocabulary_rows(shape, self.layout.tp))
        self.expert_rank = parallel_state.get_expert_model_parallel_rank()
        self.parameters: dict[str, torch.nn.Parameter] = {}  # by Megatron's global name
        self.local: list[tuple[PolicyModel, dict[str, Rule]]] = []
        for number, chunk in enumerate(chunks):
            rules = local_rules(self.rules, shape, self.layout, world.pp_rank, number, self.expert_rank)
            own = dict(chunk.named_parameters())
            assert own.keys() == rules.keys(), sorted(own.keys() ^ rules.keys())
            self.local.append((chunk, rules))
            for name, rule in rules.items():
                self.parameters[rule.megatron] = own[name]
                # Megatron marks shards while it initialises them, which we skip. It would take unmarked ones for copies
                # and leave them out of the gradient norm.
                if rule.partition is not None and not getattr(own[name], "tensor_model_parallel", False):
                    set_tensor_model_parallel_attributes(own[name], True, rule.partition, stride=1)
        self.places = self._places(shape)

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Fill the parameters from a folder of safetensors. Each rank reads only its own part."""
        files = HfWeights(folder)
        files.check(self.rules)
        for chunk, rules in self.local:
            own = dict(chunk.named_parameters())
            for name, tensor in load_shards(files, rules, self.layout, self.world.tp_rank, self._expert_tp_rank()):
                own[name].copy_(tensor)

    @torch.no_grad()
    def draw(self, seed: int, std: float) -> None:
        """Fill the parameters from `seed`: norms 1, biases 0, the rest normal. Every layout gives the same model."""
        for _, rules in self.local:
            for rule in rules.values():
                parameter = self.parameters[rule.megatron]
                size = self.layout.shards(rule)
                rank = self.world.tp_rank if rule.expert is None else self._expert_tp_rank()
                slices = rule.slices(rank, size)
                parts = {
                    part.name: _initial(part.name, part.shape, seed, std, parameter.device)[slices[part.name]]
                    for part in rule.parts
                }
                parameter.copy_(rule.fuse(parts, size))

    def stream(self, read: Callable[[torch.nn.Parameter], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under Hugging Face's names, in layer order, on every rank. Collective.

        `read` maps a parameter to the tensor to send (its data, its gradient), all of one dtype. Only one bucket of at
        most `BUCKET_BYTES`, or one larger tensor, exists at a time.
        """
        sample = read(next(iter(self.parameters.values())))
        for place, bucket in self._buckets(sample.element_size()):
            expert = place.expert_rank is not None
            shapes = [rule.shape(self.layout.shards(rule)) for rule in bucket]
            sizes = [torch.Size(shape).numel() for shape in shapes]
            if self._here(place):
                flat = torch.cat([read(self.parameters[rule.megatron]).detach().reshape(-1) for rule in bucket])
            else:
                flat = sample.new_empty(sum(sizes))
            if place.expert_rank is not None and self.layout.ep > 1:
                _broadcast(flat, place.expert_rank, parallel_state.get_expert_model_parallel_group())
            if self.layout.pp > 1:
                _broadcast(flat, place.stage, parallel_state.get_pipeline_model_parallel_group())
            group = (
                parallel_state.get_expert_tensor_parallel_group()
                if expert
                else parallel_state.get_tensor_model_parallel_group()
            )
            gathered = _all_gather(flat, group)
            for rule, shape, parts in zip(bucket, shapes, gathered.split(sizes, 1), strict=True):
                yield from rule.split(rule.unshard([part.view(shape) for part in parts])).items()

    def _buckets(self, element_size: int) -> Iterator[tuple[Place, list[Rule]]]:
        """Runs of tensors with the same place, without second copies (tied output layers)."""
        sent = (rule for rule in self.rules if not rule.copy)
        for place, rules in groupby(sent, lambda rule: self.places[rule.megatron]):
            bucket: list[Rule] = []
            full = 0
            for rule in rules:
                size = torch.Size(rule.shape()).numel() * element_size
                if bucket and full + size > BUCKET_BYTES:
                    yield place, bucket
                    bucket, full = [], 0
                bucket.append(rule)
                full += size
            yield place, bucket

    def _places(self, shape: ModelShape) -> dict[str, Place]:
        places = {}
        for stage in range(self.layout.pp):
            for number in range(self.layout.vpp):
                for expert_rank in range(self.layout.ep):
                    held = local_rules(self.rules, shape, self.layout, stage, number, expert_rank)
                    for rule in held.values():
                        places[rule.megatron] = Place(stage, None if rule.expert is None else expert_rank)
        return places

    def _here(self, place: Place) -> bool:
        return place.stage == self.world.pp_rank and place.expert_rank in (None, self.expert_rank)

    def _expert_tp_rank(self) -> int:
        return parallel_state.get_expert_tensor_parallel_rank()


def _initial(name: str, shape: tuple[int, ...], seed: int, std: float, device: torch.device) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    if name.endswith(".bias"):
        return torch.zeros(shape, device=device)
    generator = torch.Generator(device).manual_seed(derive_seed(seed, name))
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)


def _broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    dist.broadcast(tensor, dist.get_global_rank(group, source), group=group)


def _all_gather(flat: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n] on each rank → [ranks, n]."""
    if group.size() == 1:
        return flat[None]
    gathered = flat.new_empty(group.size() * len(flat))
    dist.all_gather_into_tensor(gathered, flat, group=group)
    return gathered.view(group.size(), -1)
