"""Weights by broadcast from rank 0 into SGLang servers on any hosts: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.in_engine.megarl_guard import nccl_version
from megarl.rollout.weights.transport import (
    BUCKET,
    Broken,
    BucketReceiver,
    Changes,
    Named,
    Outcome,
    Receiver,
    buckets,
    in_thread,
    pause_all,
    transfer_timeout,
    verify,
)

log = logging.getLogger(__name__)

TIMEOUT = 120.0  # seconds for the members to meet, and for each bucket beside the time of its bytes
ABORT_TIMEOUT = 30.0  # seconds for NCCL to give up a group
POLL = 1e-4, 1e-2  # seconds between looks at a running broadcast: at first, at most
NCCL_TIMEOUT = timedelta(days=1)  # NCCL's own, which would end the process: ours is checked first
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
ABORT_ONLY = "2"  # torch's CleanUpOnly: after an error, NCCL's watchdog aborts the group and not the process


class NotProduced(RunError):
    """The learner failed to produce the next tensors."""


class Unusable(RunError):
    """A server cannot take part in a broadcast. Another try would not help."""


class BroadcastTransport:
    """Broadcasts each bucket from rank 0 to a process group of rank 0 and every rank of every server.

    While a bucket travels, the next one is gathered: at most two are in memory.
    A member that dies breaks the group. The group is then aborted, and the send fails with a Broken that names the
    cause: after `timeout` seconds and the time of a bucket's bytes at most. The next send forms a new group. A
    restarted engine waits for the next send.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        backend: str = "gloo",
        address: str = "127.0.0.1",
        bucket: int = BUCKET,
        timeout: float = TIMEOUT,
    ) -> None:
        """`address`: this host, as the servers reach it. `bucket`: in bytes. `timeout`: in seconds."""
        self._dtype = dtype
        self._backend = backend
        self._address = address
        self._bucket = bucket
        self._timeout = timeout
        self._changes = Changes(dtype)
        self._group: dist.ProcessGroup | None = None
        self._members: list[BucketReceiver] = []
        self._name = ""
        self._given_up = threading.Event()  # nobody waits for the running broadcast any more

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[Receiver]) -> Outcome:
        outcome = Outcome()
        members: list[BucketReceiver] = []
        try:
            async with AsyncExitStack() as paused:
                members = await pause_all(paused, engines, "distributed", outcome)
                digests = {engine: digest for engine in members if (digest := engine.digests()) is not None}
                if self._members != members:
                    await self.close()
                    await self._form(members)
                await asyncio.gather(*(engine.begin_update() for engine in members))
                source = self._changes.only(version, tensors, members, digests.values())
                made = buckets(source, self._dtype, self._bucket)
                bucket = await _following(made)
                while bucket is not None:
                    outcome.sent_bytes += sum(tensor.nbytes for _, tensor in bucket)
                    bucket = await self._deliver(bucket, members, made)
                await asyncio.gather(*(engine.end_update(version) for engine in members))
        except Exception as e:
            await self._abort()
            await asyncio.gather(*(engine.abandon_update() for engine in members))
            if isinstance(e, Unusable):
                raise
            kind = RunError if isinstance(e, NotProduced) else Broken
            raise kind(f"weights {version}: the broadcast failed: {e}") from e
        await verify(digests, outcome)
        return outcome

    async def resend(self, engine: Receiver) -> bool:
        return False

    async def close(self) -> None:
        for engine in self._members:
            with suppress(RunError):
                await engine.leave_group(self._name)
        await self._abort()

    async def _abort(self) -> None:
        """Free the group, also one that waits for a dead member. Raises DeadlineExceeded."""
        group, self._group, self._members = self._group, None, []
        if group is not None:
            aborted, late = await asyncio.wait([in_thread(group.abort)], timeout=ABORT_TIMEOUT)
            if late:
                raise DeadlineExceeded(f"{self._backend} to give up the group of the weights", ABORT_TIMEOUT)
            for done in aborted:
                done.result()

    async def _form(self, members: list[BucketReceiver]) -> None:
        """Form a new process group of rank 0 and `members`. Raises Unusable before it begins."""
        await self._check(members)
        self._name = f"megarl-weights-{uuid4().hex[:12]}"  # both sides remember the names of groups that are gone
        sizes = [engine.ranks for engine in members]
        world = 1 + sum(sizes)
        firsts = [1 + sum(sizes[:i]) for i in range(len(sizes))]
        waiting = timedelta(seconds=self._timeout)
        store = await asyncio.to_thread(
            dist.TCPStore, self._address, 0, world, is_master=True, timeout=waiting, wait_for_workers=False
        )
        self._group, *_ = await asyncio.gather(
            in_thread(lambda: self._join(store, world)),
            *(
                engine.join_group(self._name, self._address, store.port, first, world, self._backend)
                for engine, first in zip(members, firsts, strict=True)
            ),
        )
        self._members = members

    async def _check(self, members: Sequence[BucketReceiver]) -> None:
        """Raises Unusable, naming the server, if a group with it would fail or hang."""
        for engine in members:
            if engine.unreachable:
                raise Unusable(f"{engine.name}: {engine.unreachable}")
        if self._backend != "nccl":
            return
        ours = nccl_version()
        for engine, theirs in zip(members, await asyncio.gather(*(e.nccl_version() for e in members)), strict=True):
            if theirs is None:
                log.warning("%s does not tell its version of NCCL: it must be ours, %s", engine.name, dotted(ours))
            elif list(theirs) != list(ours or ()):
                raise Unusable(
                    f"{engine.name} has NCCL {dotted(theirs)}, the learner {dotted(ours)}: NCCL refuses a group of two "
                    "versions; install the engine's torch in the version of the learner's, or set "
                    "rollout.servers.weight_transport: disk"
                )

    def _join(self, store: dist.TCPStore, world: int) -> dist.ProcessGroup:
        """Join as rank 0 of a group beside the default one.

        torch has no public call for that. The servers use this one too, and both sides must use the same store keys.
        """
        from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper, _world

        with not_split(), errors_that_abort_only():
            group, _ = _new_process_group_helper(
                world,
                0,
                [],
                dist.Backend(self._backend),
                dist.PrefixStore(self._name, store),
                group_name=GroupName(self._name),
                timeout=NCCL_TIMEOUT if self._backend == "nccl" else timedelta(seconds=self._timeout),
            )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        return group

    async def _deliver(
        self, bucket: list[Named], members: Sequence[BucketReceiver], made: Iterator[list[Named]]
    ) -> list[Named] | None:
        """Deliver `bucket` while the next of `made` is gathered, which is returned."""
        delivered, following = await asyncio.gather(
            self._send_bucket(bucket, members), _following(made), return_exceptions=True
        )
        for result in (following, delivered):
            if isinstance(result, BaseException):
                raise result
        assert following is None or isinstance(following, list)
        return following

    async def _send_bucket(self, bucket: Sequence[Named], members: Sequence[BucketReceiver]) -> None:
        self._given_up.clear()
        sending = in_thread(lambda: self._broadcast(bucket))
        try:
            await asyncio.gather(asyncio.shield(sending), *(engine.receive(self._name, bucket) for engine in members))
        except BaseException:
            self._given_up.set()
            await self._abort()  # also ends the thread, which else may wait in NCCL for a dead server
            await asyncio.wait([sending], timeout=ABORT_TIMEOUT)
            raise

    def _broadcast(self, bucket: Sequence[Named]) -> None:
        """Broadcast, and return when the tensors have left. Raises DeadlineExceeded.

        NCCL's `wait` lets the device wait, not us: with a dead server it would never go on.
        """
        assert self._group is not None
        seconds = self._timeout + transfer_timeout(sum(tensor.nbytes for _, tensor in bucket))
        deadline, pause = time.monotonic() + seconds, POLL[0]
        handles = [dist.broadcast(tensor.contiguous(), src=0, group=self._group, async_op=True) for _, tensor in bucket]
        for handle in handles:
            while not handle.is_completed():
                if self._given_up.wait(pause):
                    return
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"the servers to receive {bucket[0][0]} and what follows it", seconds)
                pause = min(2 * pause, POLL[1])
            handle.wait()  # raises what went wrong


async def _following(made: Iterator[list[Named]]) -> list[Named] | None:
    """The next bucket; None after the last. Raises NotProduced.

    The learner's ranks gather it together. So it is awaited also when this is cancelled.
    """
    gathering = in_thread(lambda: next(made, None))
    try:
        return await asyncio.shield(gathering)
    except Exception as e:
        raise NotProduced(str(e)) from e
    finally:
        await asyncio.wait([gathering])


@contextmanager
def not_split() -> Iterator[None]:
    """Groups made in the body are not split from the default one.

    If that is bound to a device, torch splits every group from it (`ncclCommSplit`). All its ranks must take part in
    that, but only this one makes the group: both sides would hang.
    """
    default = dist.group.WORLD if dist.is_initialized() else None
    device = default.bound_device_id if default is not None else None
    if default is None or device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


@contextmanager
def errors_that_abort_only() -> Iterator[None]:
    """NCCL's watchdog ends no process because of the groups that are made in the body. torch asks this variable."""
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = ABORT_ONLY
    try:
        yield
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before


def dotted(version: Sequence[int] | None) -> str:
    return ".".join(map(str, version)) if version else "unknown"
