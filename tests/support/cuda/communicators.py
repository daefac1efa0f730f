"""Which NCCL communicators a learner's ranks and a server of it make: real torch and megarl, NCCL written down.

python -m tests.support.cuda.communicators learner PARALLEL     one rank, as torchrun's variables say
python -m tests.support.cuda.communicators engine GROUP ADDRESS PORT RANK RANKS
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.cuda import launch

MODULE = ["-m", "tests.support.cuda.communicators"]
TIMEOUT = 200.0  # seconds for ranks to meet
STARTED, SENDING = "the groups are made", "the weights are sent"
Calls = Counter[tuple[str, int, int]]
"""(NCCL's function, ranks, rank) → number."""


class Server:
    """A client of an engine that has one rank, which takes part in the group of the weights as SGLang's does."""

    name, version, ranks, unreachable = "the server", None, 1, ""
    process: subprocess.Popen[str] | None = None

    @contextlib.asynccontextmanager
    async def pause(self) -> AsyncIterator[None]:
        yield

    async def nccl_version(self) -> Sequence[int]:
        import torch

        return torch.cuda.nccl.version()

    async def join_group(self, group: str, address: str, port: int, rank: int, world_size: int, backend: str) -> None:
        assert backend == "nccl"
        self.process = launch.python([*MODULE, "engine", group, address, str(port), str(rank), str(world_size)])

    async def begin_update(self) -> None: ...
    async def load_serialized(self, serialized: str) -> None: ...
    async def receive(self, group: str, named: Any) -> None: ...
    async def leave_group(self, group: str) -> None: ...
    async def end_update(self, version: int) -> None: ...
    async def abandon_update(self) -> None: ...
    async def load_folder(self, version: int, folder: Path) -> None: ...
    async def verify(self, sent: Any) -> None: ...
    def digests(self) -> None:
        return None


def learner(parallel: dict[str, Any]) -> None:
    """Start a rank; rank 0 then sends weights to one server, and waits until both have connected."""
    import torch
    import torch.distributed as dist
    from megatron.core import tensor_parallel

    from megarl.config import Parallel, Precision
    from megarl.learner.parallel import start
    from megarl.rollout.weights.broadcast import BroadcastTransport

    tensor_parallel.model_parallel_cuda_manual_seed = lambda *_, **__: None  # draws on the device
    world = start(Parallel(**parallel), Precision(dtype="bf16"), 0, TIMEOUT)
    print(STARTED, file=sys.stderr, flush=True)
    if world.is_controller:
        server = Server()
        before = set(dist.distributed_c10d._world.pg_map)
        transport = BroadcastTransport(torch.bfloat16, backend="nccl", address="127.0.0.1")
        print(SENDING, file=sys.stderr, flush=True)
        asyncio.run(transport.send(1, [], [server]))
        (group,) = set(dist.distributed_c10d._world.pg_map) - before
        # What its first broadcast would do.
        group._get_backend(torch.device("cuda")).eager_connect_single_device(torch.device("cuda", 0))
        assert server.process is not None
        out, err = server.process.communicate(timeout=2 * TIMEOUT)
        print(json.dumps([err, server.process.returncode]), flush=True)
    world.barrier("the weights")
    os._exit(0)


def engine(group: str, address: str, port: int, rank: int, ranks: int) -> None:
    """Join as SGLang's `init_custom_process_group` does, and connect."""
    import datetime

    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper

    timeout = datetime.timedelta(seconds=TIMEOUT)
    store = dist.TCPStore(address, port, ranks, is_master=False, timeout=timeout)
    made, _ = _new_process_group_helper(
        ranks, rank, [], dist.Backend("nccl"), dist.PrefixStore(group, store),
        group_name=GroupName(group), timeout=timeout,
    )  # fmt: skip
    made._get_backend(torch.device("cuda")).eager_connect_single_device(torch.device("cuda", 0))
    os._exit(0)


def calls(text: str) -> Calls:
    """The calls that a process wrote down."""
    found = re.findall(r"^NCCL (\w+) ranks=(\d+) rank=(\d+)$", text, re.M)
    return Counter((name, int(ranks), int(rank)) for name, ranks, rank in found)


def record(parallel: dict[str, Any], ranks: int, timeout: float) -> tuple[list[Calls], list[Calls], Calls]:
    """NCCL's calls: at start by rank, then with the weights by rank, and those of the server's process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    words = [*MODULE, "learner", json.dumps(parallel)]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [launch.python(words, **common, RANK=str(r), LOCAL_RANK=str(r)) for r in range(ranks)]
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank left with {process.returncode}\n{err[-4000:]}")
    halves = [err.partition(STARTED) for _, err in said]
    server, code = json.loads(said[0][0].splitlines()[-1])
    assert code == 0, server[-4000:]
    return [calls(before) for before, _, _ in halves], [calls(after) for _, _, after in halves], calls(server)


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    if role == "learner":
        learner(json.loads(rest[0]))
    else:
        engine(rest[0], rest[1], *map(int, rest[2:]))
