"""What every weight transport shares: buckets, checksums of what is sent, and what it needs of an engine's client."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from megarl.errors import RunError
from megarl.rollout.weights.verify import checksum

BUCKET = 256 << 20  # bytes sent together
CUDA_BUCKET = 1 << 30  # the same between GPUs, where the requests of each bucket cost more than its bytes
SLOWEST = 100e6  # bytes per second: of a server that reads weights from a slow disk, or checksums them on one core

T = TypeVar("T")

TIED = ("model.embed_tokens.weight", "lm_head.weight")

Named = tuple[str, torch.Tensor]


class NotAsSent(RunError):
    """An engine, or the folder that it loads from, has other weights than those that were sent."""


class Broken(RunError):
    """A send failed for every engine because one of them did."""


class NotDelivered(RunError):
    """No engine has the weights: those that had them are gone, and those that came back wait for another send."""


class Digests(Protocol):
    """Digests of the sent tensors, in the form in which one kind of server reports its own."""

    def add(self, name: str, tensor: torch.Tensor, total: int | None = None) -> None:
        """`total`: the tensor's `checksum`, if it is known."""
        ...

    def differing(self, reported: Mapping[str, Any]) -> list[str]:
        """The names of the tensors whose digests, as a server reports them, differ from what was sent."""
        ...


class Receiver(Protocol):
    """The client of an engine that can load weights from a folder."""

    name: str
    version: int | None  # of the last update; None = the weights that the engine started with

    def pause(self) -> AbstractAsyncContextManager[None]: ...
    async def load_folder(self, version: int, folder: Path) -> None: ...
    def digests(self) -> Digests | None: ...
    async def verify(self, sent: Digests) -> None: ...


@runtime_checkable
class BucketReceiver(Receiver, Protocol):
    """The client of an engine that can load weights bucket by bucket: SGLang's."""

    ranks: int  # processes of the server that have weights
    unreachable: str  # why a broadcast cannot reach all of them; empty: it can

    async def nccl_version(self) -> Sequence[int] | None: ...
    async def begin_update(self) -> None: ...
    async def load_serialized(self, serialized: str) -> None: ...
    async def join_group(
        self, group: str, address: str, port: int, rank: int, world_size: int, backend: str
    ) -> None: ...
    async def receive(self, group: str, named: Sequence[Named]) -> None: ...
    async def leave_group(self, group: str) -> None: ...
    async def end_update(self, version: int) -> None: ...
    async def abandon_update(self) -> None: ...


@dataclass(slots=True)
class Outcome:
    """The result of a send."""

    arrived: Mapping[str, int] = field(default_factory=dict)  # checksums of what was read back, by tensor name
    failures: dict[Receiver, Exception] = field(default_factory=dict)  # engines without the new weights
    sent_bytes: int = 0  # counted once, however many engines receive them


class Transport(Protocol):
    """One way to send weights. The outcome names the engines that failed. The others get the weights."""

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[Receiver]) -> Outcome:
        """Load `tensors` (Hugging Face names, read in order, once) into every engine as weight `version`.

        Raises NotAsSent, naming the tensor, if an engine has something else than what was sent, and Broken if the
        failure of one engine leaves all others without the weights.
        """
        ...

    async def resend(self, engine: Receiver) -> bool:
        """Load the weights of the last send into a restarted engine, with the checks of a send. False: it must wait for
        the next send."""
        ...

    async def close(self) -> None: ...


def transfer_timeout(nbytes: int) -> float:
    """Seconds that a transfer may take because of its bytes."""
    return nbytes / SLOWEST


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run `function` in a thread, on this thread's CUDA device. Unlike asyncio's, the thread never delays our exit."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def settle(result: T | None, error: BaseException | None) -> None:
        if outcome.done():  # cancelled
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, error = None, None
        try:
            if device is not None:
                torch.cuda.set_device(device)
            result = function()
        except BaseException as e:
            error = e
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="weights", daemon=True).start()
    return outcome


def buckets(tensors: Iterable[Named], dtype: torch.dtype, limit: int = BUCKET) -> Iterator[list[Named]]:
    """Cast `tensors` to `dtype` and group them into lists of at most `limit` bytes. One tensor may be larger."""
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


async def pause_all(
    stack: AsyncExitStack, engines: Sequence[Receiver], transport: str, outcome: Outcome
) -> list[BucketReceiver]:
    """Pause every engine until `stack` closes. Returns those that paused, and records the failures of the others.

    Raises RunError if an engine cannot load buckets, which `transport` sends.
    """
    receivers = [engine for engine in engines if isinstance(engine, BucketReceiver)]
    for engine in engines:
        if engine not in receivers:
            raise RunError(f"{engine.name}: this engine cannot receive weights by '{transport}'; use 'disk'")

    async def pause(engine: BucketReceiver) -> None:
        await stack.enter_async_context(engine.pause())

    return await each(receivers, pause, outcome)


async def each(
    engines: Sequence[BucketReceiver], action: Callable[[BucketReceiver], Awaitable[None]], outcome: Outcome
) -> list[BucketReceiver]:
    """Run `action` on every engine at once. Returns those that succeeded, and records the failures of the others."""
    results = await asyncio.gather(*(action(engine) for engine in engines), return_exceptions=True)
    for engine, result in zip(engines, results, strict=True):
        if isinstance(result, RunError):
            outcome.failures[engine] = result
        elif isinstance(result, BaseException):
            raise result
    return [engine for engine in engines if engine not in outcome.failures]


async def verify(digests: Mapping[Any, Digests], outcome: Outcome) -> None:
    """Have every `Receiver` compare its weights with its digests. Records those that fail to tell. Raises NotAsSent."""
    for engine, sent in digests.items():
        if engine not in outcome.failures:
            try:
                await engine.verify(sent)
            except NotAsSent:
                raise
            except RunError as e:
                outcome.failures[engine] = e


class Changes:
    """Casts tensors, and leaves out, by checksum, those that every engine already has."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sums: dict[str, int] = {}  # of the last send
        self._version: int | None = None  # of the last complete send

    def only(
        self, version: int, tensors: Iterable[Named], engines: Sequence[Receiver], digests: Iterable[Digests] = ()
    ) -> Iterator[Named]:
        """Those of `tensors` that changed since the last complete send. All of them if an engine missed that send.

        Adds each to `digests` as it passes. They share its one checksum.
        """
        complete = self._version is not None and all(engine.version == self._version for engine in engines)
        last, self._sums, self._version = (self._sums if complete else {}), {}, None
        for name, tensor in tensors:
            tensor = tensor.detach().to(self._dtype)
            self._sums[name] = total = checksum(tensor)
            for sent in digests:
                sent.add(name, tensor, total)
            if last.get(name) != total:
                yield name, tensor
        self._version = version


class Checks:
    """Checks what the learner sends, before any transport: no tensor is missing, and tied tensors are equal."""

    def __init__(self, tied: bool) -> None:
        """`tied`: the model's output layer is its embedding."""
        self._tied = tied
        self._names: set[str] = set()  # of the last send

    def of(self, version: int, tensors: Iterable[Named]) -> Iterator[Named]:
        """Yield `tensors`. Raises RunError for a tensor that is no longer sent, or is no longer tied."""
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
