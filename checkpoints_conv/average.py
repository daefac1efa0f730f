"""The mean of several checkpoints of one model, as a checkpoint like any other."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_conv.checkpoint import Checkpoint
from megarl.errors import UserError
from megarl.models.files.tensor_io import loaded
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape


class Average:
    """A `Checkpoint` of means, computed in float32. Formats and layouts of the members may differ."""

    format = "average"

    def __init__(self, members: list[Checkpoint]) -> None:
        self.members = members
        self.folder: Path = members[0].folder

    @cached_property
    def model(self) -> ModelShape:
        first, *rest = self.members
        for other in rest:
            if other.model != first.model:
                raise UserError(
                    f"{other.folder}: is another model than {first.folder}; average checkpoints of one model"
                )
        return first.model

    def check_whole(self) -> None:
        for member in self.members:
            member.check_whole()

    def dtype(self, rule: Rule) -> torch.dtype:
        return self.members[0].dtype(rule)

    def parts(self, rule: Rule) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for member in self.members:
            for name, tensor in member.parts(rule).items():
                values = loaded(tensor)
                total[name] = total[name].add_(values) if name in total else values.to(torch.float32, copy=True)
        return {name: tensor.div_(len(self.members)).to(self.dtype(rule)) for name, tensor in total.items()}

    def files(self) -> list[Path]:
        return [file for member in self.members for file in member.files()]
