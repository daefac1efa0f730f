"""The broadcast of weights: its group, its deadline, its refusals. The servers have no ranks, so no other process runs.

test_bucket_transports.py sends to other processes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarl.errors import RunError
from megarl.rollout.weights.broadcast import BroadcastTransport
from megarl.rollout.weights.transport import Broken, Named

NAMED = [(f"t{i}", torch.full((4, 4), float(i))) for i in range(5)]
BUCKET = 2 * 32  # bytes: two tensors in bfloat16
WAIT = 20.0  # seconds


class Server:
    """The client of a server without ranks: rank 0 is alone in the group. `dead`: it answers no bucket."""

    ranks = 0
    unreachable = ""
    nccl: Sequence[int] | None = None
    dead = False

    def __init__(self, name: str) -> None:
        self.name, self.version = name, None
        self.received: list[list[str]] = []

    @asynccontextmanager
    async def pause(self) -> AsyncIterator[None]:
        yield

    def digests(self) -> None:
        return None

    async def verify(self, sent: object) -> None: ...

    async def load_folder(self, version: int, folder: Path) -> None: ...

    async def load_serialized(self, serialized: str) -> None: ...

    async def nccl_version(self) -> Sequence[int] | None:
        return self.nccl

    async def join_group(self, *_: object) -> None: ...

    async def leave_group(self, group: str) -> None: ...

    async def begin_update(self) -> None: ...

    async def abandon_update(self) -> None: ...

    async def receive(self, group: str, named: Sequence[Named]) -> None:
        if self.dead:
            await asyncio.Event().wait()
        self.received.append([name for name, _ in named])

    async def end_update(self, version: int) -> None:
        self.version = version


def test_a_broadcast_without_an_end_is_given_up_and_its_group_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL waits for a dead server: `is_completed` stays False, and `wait` returns at once, for the device waits.

    The next send forms a new group, with the servers that still live.
    """
    aborted: list[dist.ProcessGroup] = []
    abort = dist.ProcessGroup.abort

    class Endless:
        def is_completed(self) -> bool:
            return bool(aborted)

        def wait(self) -> None: ...

    def noted(group: dist.ProcessGroup) -> None:
        aborted.append(group)
        abort(group)

    async def main() -> None:
        transport = BroadcastTransport(torch.bfloat16, bucket=BUCKET, timeout=1.0)
        dead, live = Server("e0"), Server("e1")
        dead.dead = True
        with monkeypatch.context() as patch:
            patch.setattr(dist.ProcessGroup, "abort", noted)
            patch.setattr(dist, "broadcast", lambda *_, **__: Endless())
            with pytest.raises(Broken, match="gave up after 1 s waiting for the servers to receive t0"):
                async with asyncio.timeout(WAIT):
                    await transport.send(1, NAMED, [dead, live])
        assert len(aborted) == 1
        outcome = await transport.send(2, NAMED, [live])
        assert not outcome.failures and live.version == 2

    asyncio.run(main())


def test_a_server_that_fails_ends_the_wait_for_its_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the deadline: the group is aborted as soon as a server answers that it failed."""
    aborted = threading.Event()

    class Endless:
        def is_completed(self) -> bool:
            return aborted.is_set()

        def wait(self) -> None: ...

    class Failing(Server):
        async def receive(self, group: str, named: Sequence[Named]) -> None:
            raise RunError("e0: out of memory")

    monkeypatch.setattr(dist.ProcessGroup, "abort", lambda _: aborted.set())
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: Endless())

    async def main() -> None:
        async with asyncio.timeout(WAIT):
            with pytest.raises(Broken, match="e0: out of memory"):
                await BroadcastTransport(torch.bfloat16, timeout=100 * WAIT).send(1, NAMED, [Failing("e0")])

    asyncio.run(main())
    assert aborted.is_set()


def test_a_server_of_another_nccl_or_whose_ranks_are_not_reached_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a group is made, and not as a failure that another send might mend."""
    monkeypatch.setattr("megarl.rollout.weights.broadcast.nccl_version", lambda: [2, 29, 7])
    servers = [Server("e0"), Server("e1")]
    servers[0].nccl, servers[1].nccl = [2, 29, 7], [2, 30, 7]
    transport = BroadcastTransport(torch.bfloat16, backend="nccl")
    with pytest.raises(
        RunError, match=r"^e1 has NCCL 2\.30\.7, the learner 2\.29\.7: .*weight_transport: disk"
    ) as refused:
        asyncio.run(transport.send(1, NAMED, servers))
    assert not isinstance(refused.value, Broken)
    servers[0].unreachable = "a broadcast does not reach all ranks of --pp-size 2"
    with pytest.raises(RunError, match="^e0: a broadcast does not reach all ranks of --pp-size 2$"):
        asyncio.run(transport.send(1, NAMED, servers))
    assert not any(server.received for server in servers)


def test_the_group_is_not_split_from_a_default_group_bound_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not look for a group to split. NCCL would hang in that, for only rank 0 makes the group."""
    looked: list[object] = []
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_split_source", looked.append)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
        server = Server("e0")
        asyncio.run(BroadcastTransport(torch.bfloat16).send(1, NAMED, [server]))
        assert server.version == 1 and not looked
        assert dist.group.WORLD.bound_device_id == torch.device("cuda", 0)
    finally:
        dist.destroy_process_group()


def test_the_next_bucket_is_gathered_while_one_travels() -> None:
    """The first bucket is not received before a tensor of the second was asked for."""
    second = threading.Event()

    def gather() -> Iterator[Named]:
        for name, tensor in NAMED:
            if name == "t4":
                second.set()
            yield name, tensor

    class Waiting(Server):
        async def receive(self, group: str, named: Sequence[Named]) -> None:
            if named[0][0] == "t0":
                assert await asyncio.to_thread(second.wait, WAIT)
            await super().receive(group, named)

    server = Waiting("e0")
    asyncio.run(BroadcastTransport(torch.bfloat16, bucket=BUCKET).send(1, gather(), [server]))
    assert server.received == [["t0", "t1"], ["t2", "t3"], ["t4"]]


def test_a_tensor_that_the_learner_cannot_produce_is_no_failure_of_a_server() -> None:
    """It ends the run: a send again would fail again."""

    def gather() -> Iterator[Named]:
        yield from NAMED[:3]
        raise ValueError("t3 is gone")

    with pytest.raises(RunError, match="weights 1: the broadcast failed: t3 is gone") as failed:
        asyncio.run(BroadcastTransport(torch.bfloat16, bucket=BUCKET).send(1, gather(), [Server("e0")]))
    assert not isinstance(failed.value, Broken)
