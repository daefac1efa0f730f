"""Values between the ranks of this run. Nothing from outside the run is ever unpickled."""

from __future__ import annotations

import io
import pickle
from typing import Any, TypeVar

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


def gather(value: T, world: World, senders: int) -> list[T]:
    """The values of the first `senders` ranks, in rank order, on the controller; [] elsewhere.

    For large values: the controller takes them one by one, each of its own size. All ranks call it; the others return
    at once.
    """
    with collective("a gathering on rank 0", world.deadline_s):
        if world.is_controller:
            return [value, *(_receive(rank, world) for rank in range(1, senders))]
        if world.rank < senders:
            _send(value, world)
    return []


def _send(value: object, world: World) -> None:
    file = io.BytesIO()
    pickle.dump(value, file)
    payload = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    dist.send(torch.tensor([len(payload)]), 0, group=world.control)
    dist.send(payload, 0, group=world.control)


def _receive(rank: int, world: World) -> Any:
    size = torch.zeros(1, dtype=torch.int64)
    dist.recv(size, rank, group=world.control)
    payload = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(payload, rank, group=world.control)
    return pickle.loads(payload.numpy().data)
