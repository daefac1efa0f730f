"""Weights by broadcast from rank 0 into SGLang servers on any hosts: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from megarl.errors import RunError
from megarl.rollout.weights.transport import (
    BUCKET,
    Broken,
    BucketReceiver,
    Changes,
    Named,
    Outcome,
    Receiver,
    buckets,
    digested,
    pause_all,
    verify,
)

TIMEOUT = timedelta(seconds=120)  # of every operation of the group


class BroadcastTransport:
    """Broadcasts each bucket from rank 0 to a process group of rank 0 and every rank of every server.

    A member that dies breaks the group. The send then fails with a Broken that names the cause, after `TIMEOUT` at
    most, and the next send forms a new group. A restarted engine waits for the next send.
    """

    def __init__(
        self, dtype: torch.dtype, *, backend: str = "gloo", address: str = "127.0.0.1", bucket: int = BUCKET
    ) -> None:
        """`address`: this host, as the servers reach it."""
        self._dtype = dtype
        self._backend = backend
        self._address = address
        self._bucket = bucket
        self._changes = Changes()
        self._group: dist.ProcessGroup | None = None
        self._members: list[BucketReceiver] = []
        self._name = ""

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[Receiver]) -> Outcome:
        outcome = Outcome()
        members: list[BucketReceiver] = []
        producing = False
        try:
            async with AsyncExitStack() as paused:
                members = await pause_all(paused, engines, "distributed", outcome)
                digests = {engine: digest for engine in members if (digest := engine.digests()) is not None}
                if self._members != members:
                    await self.close()
                    await self._form(members)
                await asyncio.gather(*(engine.begin_update() for engine in members))
                source = self._changes.only(version, digested(tensors, self._dtype, digests.values()), members)
                made = buckets(source, self._dtype, self._bucket)
                while True:
                    producing = True
                    bucket = next(made, None)
                    producing = False
                    if bucket is None:
                        break
                    outcome.sent_bytes += sum(tensor.nbytes for _, tensor in bucket)
                    await asyncio.gather(
                        asyncio.to_thread(self._broadcast, bucket),
                        *(engine.receive(self._name, bucket) for engine in members),
                    )
                await asyncio.gather(*(engine.end_update(version) for engine in members))
        except Exception as e:
            self._group, self._members = None, []  # broken for all its members
            await asyncio.gather(*(engine.abandon_update() for engine in members))
            kind = RunError if producing else Broken
            raise kind(f"weights {version}: the broadcast failed: {e}") from e
        await verify(digests, outcome)
        return outcome

    async def resend(self, engine: Receiver) -> bool:
        return False

    async def close(self) -> None:
        members, self._members, self._group = self._members, [], None
        for engine in members:
            with suppress(RunError):
                await engine.leave_group(self._name)

    async def _form(self, members: list[BucketReceiver]) -> None:
        """Form a new process group of rank 0 and `members`."""
        self._name = f"megarl-weights-{uuid4().hex[:12]}"  # both sides remember the names of groups that are gone
        sizes = [engine.ranks for engine in members]
        world = 1 + sum(sizes)
        firsts = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        store = await asyncio.to_thread(
            dist.TCPStore, self._address, 0, world, is_master=True, timeout=TIMEOUT, wait_for_workers=False
        )
        self._group, *_ = await asyncio.gather(
            asyncio.to_thread(self._join, store, world),
            *(
                engine.join_group(self._name, self._address, store.port, first, world, self._backend)
                for engine, first in zip(members, firsts, strict=True)
            ),
        )
        self._members = members

    def _join(self, store: dist.TCPStore, world: int) -> dist.ProcessGroup:
        """Join as rank 0 of a group beside the default one.

        torch has no public call for that. The servers use this one too, and both sides must use the same store keys.
        """
        from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper, _world

        group, _ = _new_process_group_helper(
            world,
            0,
            [],
            dist.Backend(self._backend),
            dist.PrefixStore(self._name, store),
            group_name=GroupName(self._name),
            timeout=TIMEOUT,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        return group

    def _broadcast(self, bucket: Sequence[Named]) -> None:
        assert self._group is not None
        handles = [dist.broadcast(tensor.contiguous(), src=0, group=self._group, async_op=True) for _, tensor in bucket]
        for handle in handles:
            handle.wait()
