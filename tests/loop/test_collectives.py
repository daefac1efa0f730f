"""Values of any size between ranks: order, and rank 0's memory while it gathers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from megarl.config import Parallel, Precision
from megarl.learner.parallel import start
from megarl.loop.collectives import gather
from megarl.runtime.spawn import spawn

pytestmark = pytest.mark.parallel

PAYLOAD = 100 * 2**20  # bytes


def _resident(key: str) -> int:
    """Bytes, by the kernel's name."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def everyones(senders: int) -> list[str]:
    world = start(Parallel(), Precision(dtype="fp32"), 0, 60.0)
    return gather(f"rank {world.rank}", world, senders)


def grown(sizes: list[int]) -> int:
    """By how much this rank's peak memory grows while rank 0 gathers values of these sizes."""
    world = start(Parallel(), Precision(dtype="fp32"), 0, 60.0)
    value = [os.urandom(sizes[world.rank])] if sizes[world.rank] else []
    gather(["warm-up"], world, world.world_size)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    before = _resident("VmRSS")
    values = gather(value, world, world.world_size)
    peak = _resident("VmHWM") - before
    assert not values or [sum(map(len, each)) for each in values] == sizes
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("senders", [1, 2])
def test_the_controller_has_the_senders_values_in_rank_order(senders: int) -> None:
    """And nobody else has any. With one sender, which is the controller, nothing is sent."""
    found = spawn(everyones, 3, (senders,), 60.0)
    assert found == [[f"rank {i}" for i in range(senders)], [], []]


@pytest.mark.slow
@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rank_0_needs_at_most_twice_the_payload(ranks: int, owner: int) -> None:
    """100 MB on one rank, nothing on the others. The bound does not grow with the ranks: `gather_object` pads each
    rank's value to the largest, and needed 5, 9 and 17 times the payload."""
    sizes = [PAYLOAD if rank == owner else 0 for rank in range(ranks)]
    grew = spawn(grown, ranks, (sizes,), 120.0)[0]
    print(f"{ranks} ranks, payload on rank {owner}: rank 0's peak grew by {grew / PAYLOAD:.2f} payloads")
    assert grew <= 2.1 * PAYLOAD if owner else grew <= 0.1 * PAYLOAD
