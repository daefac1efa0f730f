"""Whether two checkpoints have the same weights, in any formats and layouts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints_conv.checkpoint import Checkpoint
from megarl.errors import UserError
from megarl.models.families import rules
from megarl.models.files.tensor_io import INTEGERS, loaded, tensor_bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor of two checkpoints, compared in the narrower of its two types."""

    name: str  # Hugging Face's
    megatron: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    differing: int  # values that are not bit-equal
    max_difference: float  # largest |a - b|; nan where one is nan and the other is not
    digests: tuple[str, str]
    transposed: bool  # b is a's transpose

    @property
    def equal(self) -> bool:
        return self.differing == 0


def compare(a: Checkpoint, b: Checkpoint) -> Iterator[Comparison]:
    """Every tensor of both, in layer order, one at a time in memory.

    Raises UserError if the architectures differ or a checkpoint is incomplete.
    """
    if a.model != b.model:
        raise UserError(f"{b.folder}: is another model than {a.folder}: {_first_difference(a.model, b.model)}")
    a.check_whole()
    b.check_whole()
    for rule in rules(a.model):
        if rule.copy:
            continue
        other = b.parts(rule)
        for name, tensor in a.parts(rule).items():
            yield _compare(name, rule.megatron, loaded(tensor), loaded(other[name]))


def misplaced(differences: list[Comparison]) -> dict[str, str]:
    """What seems to have happened to differing tensors, where it is known: name → words."""
    by_digest = {difference.digests[0]: difference.name for difference in differences}
    found = {d.name: "transposed" for d in differences if d.transposed}
    for difference in differences:
        source = by_digest.get(difference.digests[1])
        if source is not None and source != difference.name:
            found[difference.name] = f"contains {source}"
    return found


def _compare(name: str, megatron: str, a: Tensor, b: Tensor) -> Comparison:
    dtypes = a.dtype, b.dtype
    narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
    a, b = a.to(narrow), b.to(narrow)
    bits = INTEGERS[narrow.itemsize]
    differing = int((a.contiguous().view(bits) != b.contiguous().view(bits)).sum())
    if not differing:
        return Comparison(name, megatron, tuple(a.shape), dtypes, 0, 0.0, ("", ""), False)
    difference = float((a.float() - b.float()).abs().max())
    transposed = a.dim() == 2 and a.shape[0] == a.shape[1] and torch.equal(a.T, b)
    return Comparison(
        name, megatron, tuple(a.shape), dtypes, differing, difference, (_digest(a), _digest(b)), transposed
    )


def _digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor_bytes(tensor), digest_size=16, key=str(tuple(tensor.shape)).encode()).hexdigest()


def _first_difference(a: object, b: object) -> str:
    names = a.__dataclass_fields__  # type: ignore[attr-defined]
    name = next(name for name in names if getattr(a, name) != getattr(b, name))
    return f"{name} {getattr(b, name)!r}, not {getattr(a, name)!r}"
