"""Small values between the ranks of this run. Nothing from outside the run is ever unpickled."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from megarl.learner.parallel import World
from megarl.runtime.watchdog import collective

T = TypeVar("T")


def broadcast(value: T, world: World) -> T:
    """The controller's value, on every rank. Collective."""
    if world.world_size == 1:
        return value
    box = [value]
    with collective("a broadcast from rank 0", world.deadline_s):
        dist.broadcast_object_list(box, 0, group=world.control)
    return box[0]


def any_rank(value: bool, world: World) -> bool:
    """Whether it is true on any rank. Collective."""
    if world.world_size == 1:
        return value
    votes = torch.tensor([int(value)])
    with collective("a vote of all ranks", world.deadline_s):
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=world.control)
    return bool(votes.item())


def gather(value: T, world: World) -> list[T]:
    """Every rank's value, in rank order, on the controller; [] elsewhere. Collective."""
    if world.world_size == 1:
        return [value]
    values: list[T | None] | None = [None] * world.world_size if world.is_controller else None
    with collective("a gathering on rank 0", world.deadline_s):
        dist.gather_object(value, values, 0, group=world.control)
    return values if values is not None else []  # type: ignore[return-value]
