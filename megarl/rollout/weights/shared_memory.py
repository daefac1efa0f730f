"""Weights through shared memory, into SGLang servers on this host."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from megarl.rollout.weights.transport import (
    BUCKET,
    BucketReceiver,
    Changes,
    Named,
    Outcome,
    Receiver,
    buckets,
    each,
    pause_all,
    verify,
)

ALIGNMENT = 64  # bytes


class SharedMemoryTransport:
    """Copies each bucket into shared memory once. The servers map it and copy it into their weights.

    Sends only tensors that changed since the last send. A restarted engine waits for the next send.
    """

    def __init__(self, dtype: torch.dtype, *, bucket: int = BUCKET) -> None:
        self._dtype = dtype
        self._bucket = bucket
        self._changes = Changes(dtype)

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[Receiver]) -> Outcome:
        outcome = Outcome()
        async with AsyncExitStack() as paused:
            live = await pause_all(paused, engines, "tensor", outcome)
            digests = {engine: digest for engine in live if (digest := engine.digests()) is not None}
            live = await each(live, lambda engine: engine.begin_update(), outcome)
            source = self._changes.only(version, tensors, live, digests.values())
            try:
                for bucket in buckets(source, self._dtype, self._bucket):
                    outcome.sent_bytes += sum(tensor.nbytes for _, tensor in bucket)
                    live = await _load(bucket, live, outcome)
            except BaseException:  # the learner failed to produce a tensor
                await asyncio.gather(*(engine.abandon_update() for engine in live))
                raise
            live = await each(live, lambda engine: engine.end_update(version), outcome)
        await verify(digests, outcome)
        return outcome

    async def resend(self, engine: Receiver) -> bool:
        return False

    async def close(self) -> None:
        pass


async def _load(bucket: Sequence[Named], engines: Sequence[BucketReceiver], outcome: Outcome) -> list[BucketReceiver]:
    """Have every engine copy a bucket. Returns those that did."""
    memory, handle = share(bucket)  # `memory` must live until the engines have copied it
    return await each(engines, lambda engine: engine.load_serialized(handle), outcome)


def share(bucket: Sequence[Named]) -> tuple[torch.Tensor, str]:
    """Copy `bucket` into one block of shared memory: (the block, text by which another process maps its tensors).

    The receiver is not our child, so the block is shared by name (`file_system`), not by an open file descriptor.
    """
    offsets, size = [], 0
    for _, tensor in bucket:
        offsets.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        memory = torch.empty(size, dtype=torch.uint8).share_memory_()
        named = []
        for (name, tensor), offset in zip(bucket, offsets, strict=True):
            view = memory[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            named.append((name, view))
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(named)
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return memory, base64.b64encode(buffer.getvalue()).decode()
