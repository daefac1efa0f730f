"""Weights through shared memory into SGLang servers on this host."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from megarl.errors import RunError
from megarl.rollout.servers.remote import Named, Outcome, RemoteEngine
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.rollout.weights.transport import BUCKET, Changes, buckets, each, hush, observed


class TensorTransport:
    """Each bucket is copied once into shared memory; the servers get a handle to it and copy it into their weights.

    Only tensors that changed since the last send travel. An engine that starts anew waits for the next send.
    """

    def __init__(self, dtype: torch.dtype, *, bucket: int = BUCKET) -> None:
        self._dtype = dtype
        self._bucket = bucket
        self._changes = Changes()

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[RemoteEngine]) -> Outcome:
        outcome = Outcome()
        async with AsyncExitStack() as quiet:
            live = await hush(quiet, sglang_only(engines, "tensor"), outcome)
            digests = {engine: digest for engine in live if (digest := engine.digests()) is not None}
            live = await each(live, lambda engine: engine.begin_update(), outcome)
            source = observed(tensors, self._dtype, list(digests.values()))
            try:
                for bucket in buckets(self._changes.only(version, source, live), self._dtype, self._bucket):
                    outcome.sent_bytes += sum(tensor.nbytes for _, tensor in bucket)
                    live = await _load(bucket, live, outcome)
            except BaseException:  # of the tensors' source
                await asyncio.gather(*(engine.abandon_update() for engine in live))
                raise
            live = await each(live, lambda engine: engine.end_update(version), outcome)
        for engine in live:
            if engine in digests:
                await engine.verify(digests[engine])
        return outcome

    async def resend(self, engine: RemoteEngine) -> bool:
        return False

    async def close(self) -> None:
        pass


async def _load(bucket: Sequence[Named], engines: Sequence[SGLangEngine], outcome: Outcome) -> list[SGLangEngine]:
    """Have every engine copy a bucket; returns those that did."""
    shared = share(bucket)
    return await each(engines, lambda engine: engine.load_serialized(shared.text), outcome)


class Shared:
    """A bucket in shared memory and the text that lets another process map it; lives as long as this object."""

    def __init__(self, memory: torch.Tensor, text: str) -> None:
        self.memory = memory
        self.text = text


def share(bucket: Sequence[Named]) -> Shared:
    """Copy `bucket` into one block of shared memory and describe its tensors for another process.

    The block goes by name (`file_system`), not by an open file: the receiver is no child of ours.
    """
    step = 64  # keeps every tensor aligned
    offsets, size = [], 0
    for _, tensor in bucket:
        offsets.append(size)
        size += -(-tensor.nbytes // step) * step
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
    return Shared(memory, base64.b64encode(buffer.getvalue()).decode())


def sglang_only(engines: Sequence[RemoteEngine], mode: str) -> list[SGLangEngine]:
    """`engines`, all of them SGLang's; raises RunError otherwise."""
    for engine in engines:
        if not isinstance(engine, SGLangEngine):
            raise RunError(f"{engine.name}: {engine.kind} cannot take weights by '{mode}'; use 'disk'")
    return [engine for engine in engines if isinstance(engine, SGLangEngine)]
