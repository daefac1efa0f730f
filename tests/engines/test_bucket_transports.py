"""Broadcast and shared memory into another process, which receives as an SGLang rank does. No SGLang runs here."""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import pickle
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.errors import RunError
from megarl.rollout.weights.broadcast import BroadcastTransport
from megarl.rollout.weights.disk import DiskTransport
from megarl.rollout.weights.shared_memory import SharedMemoryTransport
from megarl.rollout.weights.transport import Named, NotAsSent, Transport
from megarl.rollout.weights.verify import Checksums, checksum

pytestmark = pytest.mark.slow

NAMED = [(f"t{i}", torch.full((4, 4), float(i))) for i in range(5)]
BUCKET = 2 * 32  # bytes: two tensors in bfloat16
TIMEOUT = timedelta(seconds=60)


def rank(pipe: Connection) -> None:
    """One rank of a server: executes orders until it gets None, and answers each."""
    from torch.distributed.distributed_c10d import _new_process_group_helper, _world

    group, weights, bucket = None, {}, {}
    while order := pipe.recv():
        kind, *arguments = order
        if kind == "join":  # as SGLang's init_custom_process_group
            name, address, port, place, world, backend = arguments
            store = dist.PrefixStore(name, dist.TCPStore(address, port, world, False, TIMEOUT))
            group, _ = _new_process_group_helper(
                world, place, [], dist.Backend(backend), store, group_name=name, timeout=TIMEOUT
            )
            _world.pg_group_ranks[group] = {i: i for i in range(world)}
        elif kind == "receive":
            for name, shape in arguments[0]:
                weights[name] = torch.empty(shape, dtype=torch.bfloat16)
                dist.broadcast(weights[name], src=0, group=group)
        elif kind == "load":  # as SGLang's MultiprocessingSerializer
            bucket = {name: tensor.clone() for name, tensor in pickle.loads(base64.b64decode(arguments[0]))}
            weights |= bucket
        names = [name for name, _ in arguments[0]] if kind == "receive" else list(bucket)
        pipe.send((names, {name: checksum(tensor) for name, tensor in weights.items()}))


class Client:
    """The client of a server with one rank. `damaged`: a tensor that the server reports wrongly."""

    ranks = 1
    unreachable = ""

    def __init__(self, name: str) -> None:
        self.name, self.version, self.damaged = name, None, ""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=rank, args=(theirs,), daemon=True)
        self.process.start()
        self.received: list[list[str]] = []
        self.sums: dict[str, int] = {}

    async def order(self, *order: Any) -> None:
        self.pipe.send(order)
        assert await asyncio.to_thread(self.pipe.poll, 60), f"no answer to {order[0]}"
        names, self.sums = self.pipe.recv()
        if names:
            self.received.append(names)

    @asynccontextmanager
    async def pause(self) -> AsyncIterator[None]:
        yield

    def digests(self) -> Checksums:
        return Checksums(complete=True)

    async def verify(self, sent: Checksums) -> None:
        reported = {name: value + (name == self.damaged) for name, value in self.sums.items()}
        if wrong := sent.differing(reported):
            raise NotAsSent(f"{self.name}: {wrong}")

    async def load_folder(self, version: int, folder: Path) -> None:
        raise AssertionError(f"{folder}: these transports send buckets, never a folder")

    async def nccl_version(self) -> Sequence[int] | None:
        return None

    async def begin_update(self) -> None: ...

    async def abandon_update(self) -> None: ...

    async def leave_group(self, group: str) -> None: ...

    async def join_group(self, group: str, address: str, port: int, rank: int, world_size: int, backend: str) -> None:
        await self.order("join", group, address, port, rank, world_size, backend)

    async def receive(self, group: str, named: Sequence[Named]) -> None:
        await self.order("receive", [(name, tuple(tensor.shape)) for name, tensor in named])

    async def load_serialized(self, serialized: str) -> None:
        await self.order("load", serialized)

    async def end_update(self, version: int) -> None:
        self.version = version


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    made = [Client("e0"), Client("e1")]
    yield made
    for client in made:
        client.pipe.send(None)
        client.process.join(60)


@pytest.mark.parametrize("kind", [BroadcastTransport, SharedMemoryTransport])
def test_weights_arrive_in_every_server_in_buckets_and_then_only_changes(kind: Any, clients: list[Client]) -> None:
    """Two servers. A server that reports other weights than those sent is named, with the tensor."""
    transport: Transport = kind(torch.bfloat16, bucket=BUCKET)

    async def main() -> None:
        outcome = await transport.send(1, NAMED, clients)
        sums = {name: checksum(tensor.bfloat16()) for name, tensor in NAMED}
        assert not outcome.failures and outcome.sent_bytes == 5 * 32
        for client in clients:
            assert (client.sums, client.version) == (sums, 1)
            assert client.received == [["t0", "t1"], ["t2", "t3"], ["t4"]]
        changed = [*NAMED[:3], ("t3", NAMED[3][1] + 1), NAMED[4]]
        await transport.send(2, changed, clients)
        for client in clients:
            assert client.received[3:] == [["t3"]] and client.sums != sums
        clients[1].damaged = "t3"
        with pytest.raises(NotAsSent, match=r"e1: \['t3'\]"):
            await transport.send(3, NAMED, clients)
        await transport.close()

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "name"), [(BroadcastTransport, "distributed"), (SharedMemoryTransport, "tensor")])
def test_an_engine_that_loads_only_folders_is_refused_by_name(kind: Any, name: str) -> None:
    class Folders:
        name = "vllm-0"
        version = None

    with pytest.raises(RunError, match=f"vllm-0: this engine cannot receive weights by '{name}'; use 'disk'"):
        asyncio.run(kind(torch.bfloat16).send(1, NAMED, [Folders()]))


def test_a_restarted_server_gets_the_weights_again_only_from_a_folder(tmp_path: Path) -> None:
    loaded: list[tuple[int, str]] = []

    class Folders(Client):
        def __init__(self) -> None:
            self.name, self.version = "vllm-0", None

        def digests(self) -> None:
            return None

        async def load_folder(self, version: int, folder: Path) -> None:
            loaded.append((version, folder.name))

    async def main() -> None:
        (tmp_path / "model").mkdir()
        disk = DiskTransport(tmp_path / "weights", tmp_path / "model", torch.bfloat16)
        assert not await disk.resend(Folders())
        await disk.send(4, NAMED, [])
        assert await disk.resend(Folders()) and loaded == [(4, "weights-4")]
        for transport in (BroadcastTransport(torch.bfloat16), SharedMemoryTransport(torch.bfloat16)):
            assert not await transport.resend(Folders())

    asyncio.run(main())
