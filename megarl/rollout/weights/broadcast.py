"""Weights by broadcast from rank 0 into SGLang servers, on any hosts: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from megarl.errors import RunError
from megarl.rollout.servers.process import free_port
from megarl.rollout.servers.remote import CONTROL_DEADLINE, Named, Outcome, RemoteEngine
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.rollout.weights.shared_memory import sglang_only
from megarl.rollout.weights.transport import BUCKET, Changes, buckets, hush, observed


class DistributedTransport:
    """A process group of rank 0 and every rank of every server; each bucket is broadcast from rank 0.

    A member that dies breaks the group: the send ends with a RunError naming the cause, after `deadline` seconds at
    most, and the next one forms a new group. An engine that starts anew waits for the next send.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        backend: str = "gloo",
        address: str = "127.0.0.1",
        bucket: int = BUCKET,
        deadline: float = CONTROL_DEADLINE,
    ) -> None:
        """`address`: of this host, as the servers reach it."""
        self._dtype = dtype
        self._backend = backend
        self._address = address
        self._bucket = bucket
        self._deadline = deadline
        self._changes = Changes()
        self._group: dist.ProcessGroup | None = None
        self._members: list[SGLangEngine] = []
        self._name = ""

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[RemoteEngine]) -> Outcome:
        outcome = Outcome()
        members: list[SGLangEngine] = []
        try:
            async with AsyncExitStack() as quiet:
                members = await hush(quiet, sglang_only(engines, "distributed"), outcome)
                digests = {engine: digest for engine in members if (digest := engine.digests()) is not None}
                if self._members != members:
                    await self.close()
                    await self._form(members)
                await asyncio.gather(*(engine.begin_update() for engine in members))
                source = observed(tensors, self._dtype, list(digests.values()))
                for bucket in buckets(self._changes.only(version, source, members), self._dtype, self._bucket):
                    outcome.sent_bytes += sum(tensor.nbytes for _, tensor in bucket)
                    await asyncio.gather(
                        asyncio.to_thread(self._broadcast, bucket),
                        *(engine.receive(self._name, bucket) for engine in members),
                    )
                await asyncio.gather(*(engine.end_update(version) for engine in members))
        except Exception as e:
            self._group, self._members = None, []  # broken for all its members
            await asyncio.gather(*(engine.abandon_update() for engine in members))
            raise RunError(f"weights {version}: the broadcast failed: {e}") from e
        for engine, digest in digests.items():
            await engine.verify(digest)
        return outcome

    async def resend(self, engine: RemoteEngine) -> bool:
        return False

    async def close(self) -> None:
        members, self._members, self._group = self._members, [], None
        for engine in members:
            with suppress(RunError):
                await engine.leave_group(self._name)

    async def _form(self, members: list[SGLangEngine]) -> None:
        self._name = f"megarl-weights-{uuid4().hex[:12]}"  # both sides keep the names of groups that are gone
        port = free_port()
        sizes = [engine.ranks for engine in members]
        world = 1 + sum(sizes)
        firsts = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        self._group, *_ = await asyncio.gather(
            asyncio.to_thread(self._join, port, world),
            *(
                engine.join_group(self._name, self._address, port, first, world, self._backend)
                for engine, first in zip(members, firsts, strict=True)
            ),
        )
        self._members = members

    def _join(self, port: int, world: int) -> dist.ProcessGroup:
        """Rank 0 of a group beside the default one. torch has no public call for that; the servers use this one too,
        and both sides must name their keys in the store alike."""
        from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper, _world

        deadline = timedelta(seconds=self._deadline)
        store = dist.TCPStore(self._address, port, world, is_master=True, timeout=deadline, wait_for_workers=False)
        group, _ = _new_process_group_helper(
            world,
            0,
            [],
            dist.Backend(self._backend),
            dist.PrefixStore(self._name, store),
            group_name=GroupName(self._name),
            timeout=deadline,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        return group

    def _broadcast(self, bucket: Sequence[Named]) -> None:
        assert self._group is not None
        handles = [dist.broadcast(tensor.contiguous(), src=0, group=self._group, async_op=True) for _, tensor in bucket]
        for handle in handles:
            handle.wait()
