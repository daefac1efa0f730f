"""How weights travel from rank 0 into remote engines. Called by `RemoteEngine.update_weights` and the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import TypeVar

import torch

from megarl.errors import RunError
from megarl.rollout.servers.remote import Digests, Named, Outcome, RemoteEngine
from megarl.rollout.weights.verify import checksum

BUCKET = 256 << 20  # bytes that travel together; at most so much is held beside the learner's shards

TIED = ("model.embed_tokens.weight", "lm_head.weight")

E = TypeVar("E", bound=RemoteEngine)


def buckets(tensors: Iterable[Named], dtype: torch.dtype, limit: int = BUCKET) -> Iterator[list[Named]]:
    """Group `tensors`, cast to the engine's `dtype`, into lists of at most `limit` bytes (one tensor may exceed it)."""
    bucket: list[Named] = []
    size = 0
    for name, tensor in tensors:
        tensor = tensor.detach().to(dtype)
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


async def hush(quiet: AsyncExitStack, engines: Sequence[E], outcome: Outcome) -> list[E]:
    """Quieten every engine until `quiet` closes; returns those that are, and notes the failures of the others."""

    async def one(engine: RemoteEngine) -> None:
        await quiet.enter_async_context(engine.quiet())

    return await each(engines, one, outcome)


async def each(engines: Sequence[E], action: Callable[[E], Awaitable[None]], outcome: Outcome) -> list[E]:
    """Run `action` on every engine at once; those that fail are noted and left out of what is returned."""
    results = await asyncio.gather(*(action(engine) for engine in engines), return_exceptions=True)
    for engine, result in zip(engines, results, strict=True):
        if isinstance(result, RunError):
            outcome.failures[engine] = result
        elif isinstance(result, BaseException):
            raise result
    return [engine for engine in engines if engine not in outcome.failures]


def observed(tensors: Iterable[Named], dtype: torch.dtype, collectors: Sequence[Digests]) -> Iterator[Named]:
    """Cast `tensors` and show each, as it is sent, to the collectors of digests."""
    for name, tensor in tensors:
        tensor = tensor.detach().to(dtype)
        for collector in collectors:
            collector.add(name, tensor)
        yield name, tensor


class Changes:
    """Leaves out tensors that every engine already holds, by checksum."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._version: int | None = None

    def only(self, version: int, tensors: Iterable[Named], engines: Sequence[RemoteEngine]) -> Iterator[Named]:
        """Those of `tensors` that differ from the last complete send; all of them when an engine missed that."""
        complete = self._version is not None and all(engine.version == self._version for engine in engines)
        last, self._held, self._version = (self._held if complete else {}), {}, None
        for name, tensor in tensors:
            self._held[name] = digest = checksum(tensor)
            if last.get(name) != digest:
                yield name, tensor
        self._version = version


class Checks:
    """Looks at what the learner sends, before any transport: nothing left out, tied tensors equal."""

    def __init__(self, tied: bool) -> None:
        """`tied`: the model's output layer is its embedding."""
        self._tied = tied
        self._names: set[str] = set()  # of the first send

    def of(self, version: int, tensors: Iterable[Named]) -> Iterator[Named]:
        """Pass `tensors` on; raise RunError naming one that earlier sends had and this one lacks, or that is untied."""
        sums: dict[str, int] = {}
        seen: set[str] = set()
        for name, tensor in tensors:
            seen.add(name)
            if self._tied and name in TIED:
                sums[name] = checksum(tensor)
            if len(set(sums.values())) > 1:
                raise RunError(f"weights {version}: {TIED[1]} differs from {TIED[0]}, though the model ties them")
            yield name, tensor
        if absent := sorted(self._names - seen):
            raise RunError(f"weights {version}: the learner did not send {', '.join(absent)}")
        self._names = seen
