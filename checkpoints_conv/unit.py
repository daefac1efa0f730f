"""The unit of a conversion, and what a writer of a format must offer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from megarl.models.files.tensor_io import Values
from megarl.models.rules import Rule


@dataclass(frozen=True, slots=True)
class Unit:
    """The rules of one layer, or one outside the layers: written by one thread, recorded when done."""

    index: int
    rules: tuple[Rule, ...]
    dtypes: tuple[torch.dtype, ...]  # of each rule's tensors as written

    def items(self) -> Iterator[tuple[Rule, torch.dtype]]:
        return zip(self.rules, self.dtypes, strict=True)

    @property
    def nbytes(self) -> int:
        """Bytes of its Hugging Face tensors."""
        return sum(prod(part.shape) * dtype.itemsize for rule, dtype in self.items() for part in rule.parts)


class Writer(Protocol):
    """Writes one format to a folder. `write` runs in several threads, for different units."""

    settings: dict[str, Any]  # all that changes its output; an interrupted run resumes only with the same

    def rules(self) -> list[Rule]:
        """The tensors to write, with the output's layer spec and padding."""
        ...

    def nbytes(self, units: Iterable[Unit]) -> int:
        """Bytes to write, for the check of free space."""
        ...

    def lay_out(self, folder: Path, units: list[Unit]) -> None:
        """Prepare the files. Called again, with the same arguments, when an interrupted run resumes."""
        ...

    def write(self, unit: Unit, tensors: Iterable[tuple[Rule, Mapping[str, Values]]]) -> list:
        """Write every tensor of the unit. Returns a JSON record for `finish`, which may run in a later process."""
        ...

    def finish(self, units: list[Unit], records: Mapping[int, list]) -> None:
        """Write what describes all units: indices, metadata."""
        ...

    def close(self) -> None: ...


def units_of(rules: Iterable[Rule], dtype_of: Callable[[Rule], torch.dtype]) -> list[Unit]:
    """One unit per layer, and one per tensor outside the layers."""
    grouped = [
        tuple(group)
        for _, group in groupby(rules, key=lambda rule: rule.megatron if rule.layer is None else rule.layer)
    ]
    return [Unit(i, group, tuple(dtype_of(rule) for rule in group)) for i, group in enumerate(grouped)]
