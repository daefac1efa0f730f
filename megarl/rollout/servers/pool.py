"""Many remote engines behind the one `Engine` contract: routing, bounded concurrency, failures, recovery."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch

from megarl.config import Servers
from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.engine import Generation, Sampling, lineage
from megarl.rollout.servers.http import Refused
from megarl.rollout.servers.remote import RemoteEngine, Transport
from megarl.rollout.weights.transport import Checks

log = logging.getLogger(__name__)

STRIKES = 3  # failures in a row after which an engine is taken out
LOOK = 10.0  # seconds between looks at an engine's health
AGREE = 0.1  # largest difference of two engines' log-probs of the same tokens under the same weights (bf16)

State = Literal["up", "down", "stale", "lost"]  # serving; recovering; healthy without the weights; given up


@dataclass(eq=False)
class Member:
    """One engine and what the pool knows of it."""

    engine: RemoteEngine
    free: int  # requests that it may still take at once
    state: State = "up"
    strikes: int = 0
    restarts: int = 0
    cause: str = ""
    queue: deque[asyncio.Future[Member | None]] = field(default_factory=deque)
    recovery: asyncio.Task[None] | None = None


class Pool:
    """Satisfies `Engine`. Use from one event loop; `start` before the first request.

    Routing: the requests of a group share its prompt and go to one engine while it has room; another one takes them
    only when it has nothing else to do. Each engine has at most `servers.concurrency` requests at once.
    Failures: a request is redone elsewhere from its beginning, so that a caller gets exactly one result; a request
    that the server declines as wrong is not redone. An engine that fails `STRIKES` times in a row, or its health check,
    is taken out, started again (when megarl started it), given the current weights and taken back.
    """

    def __init__(
        self, engines: Sequence[RemoteEngine], transport: Transport, servers: Servers, *, tied: bool = False
    ) -> None:
        """`tied`: the model's output layer is its embedding."""
        self.redone = 0  # requests sent again after a failure, since the start
        self._members = [Member(engine, servers.concurrency) for engine in engines]
        self._transport = transport
        self._servers = servers
        self._checks = Checks(tied)
        self._home: dict[str, Member] = {}
        self._running: dict[str, tuple[Member, str]] = {}  # request id → where it runs, and under which id there
        self._serving = asyncio.Event()  # an engine is up, or none will ever be
        self._serving.set()
        self._version: int | None = None  # of the last send
        self._updating = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start every engine and the health checks; raises RunError when one does not start."""
        try:
            await asyncio.gather(*(member.engine.start() for member in self._members))
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.create_task(self._watch_health())

    @property
    def engines(self) -> list[RemoteEngine]:
        """The engines that serve now."""
        return [member.engine for member in self._members if member.state == "up"]

    # ---- the Engine contract -------------------------------------------------------------------------------------

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """See `Engine.generate`. Raises DeadlineExceeded after `servers.request_timeout`, retries included."""
        deadline = self._servers.request_timeout
        cause = "no engine became free"
        try:
            async with asyncio.timeout(deadline):
                for attempt in range(1_000_000):
                    member = await self._take(request_id)
                    name = f"{request_id}^{attempt}" if attempt else request_id
                    self._running[request_id] = (member, name)
                    try:
                        generation = await member.engine.generate(token_ids, sampling, name)
                        member.strikes = 0
                        return generation
                    except Refused:
                        raise
                    except RunError as e:
                        cause = str(e)
                        self.redone += 1
                        self._strike(member, cause)
                    finally:
                        self._running.pop(request_id, None)
                        self._give_back(member)
        except TimeoutError:
            raise DeadlineExceeded(f"'{request_id}' (last: {cause})", deadline) from None
        raise RunError(f"'{request_id}' was redone too often: {cause}")

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Scored by every engine that serves; raises RunError where two disagree by more than `AGREE`."""
        engines = self.engines
        if not engines:
            raise RunError(f"no engine serves: {self._causes()}")
        first, *others = await asyncio.gather(*(engine.score(token_ids) for engine in engines))
        for engine, scores in zip(engines[1:], others, strict=True):
            worst = max((abs(a - b) for a, b in zip(first, scores, strict=True)), default=0.0)
            if not worst <= AGREE:
                raise RunError(
                    f"{engine.name} and {engines[0].name} disagree by {worst:.3g} on the log-probs of the same tokens "
                    f"under weights {engine.version} and {engines[0].version}"
                )
        return first

    async def abort(self, request_id: str) -> None:
        if running := self._running.get(request_id):
            member, name = running
            await member.engine.abort(name)

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """One send to all engines. Those that fail are taken out; raises RunError when none is left."""
        async with self._updating:
            takers = [member for member in self._members if member.state in ("up", "stale")]
            outcome = await self._transport.send(
                version, self._checks.of(version, tensors), [member.engine for member in takers]
            )
            self._version = version
            self._home.clear()  # the caches are empty now
            for member in takers:
                if member.engine in outcome.failures:
                    self._take_out(member, f"weights {version}: {outcome.failures[member.engine]}")
                else:
                    self._set(member, "up")
        if not self.engines:
            raise RunError(f"weights {version} reached no engine: {self._causes()}")
        return outcome.arrived

    async def health(self) -> None:
        """Raises RunError when no engine serves."""
        if not self.engines:
            raise RunError(f"no engine serves: {self._causes()}")

    async def close(self) -> None:
        tasks = [task for task in (self._watch, *(member.recovery for member in self._members)) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()
        await asyncio.gather(*(member.engine.close() for member in self._members))

    # ---- routing -------------------------------------------------------------------------------------------------

    async def _take(self, request_id: str) -> Member:
        """Wait for a place at an engine that serves."""
        while True:
            while not self.engines:
                if all(member.state == "lost" for member in self._members):
                    raise RunError(f"no engine is left: {self._causes()}")
                self._serving.clear()
                await self._serving.wait()
            member = self._route(group_of(request_id))
            if member.free > 0:
                member.free -= 1
                return member
            place: asyncio.Future[Member | None] = asyncio.get_running_loop().create_future()
            member.queue.append(place)
            try:
                given = await place
            except asyncio.CancelledError:
                if place.done() and not place.cancelled() and (given := place.result()) is not None:
                    self._give_back(given)
                raise
            if given is not None:
                return given

    def _route(self, group: str) -> Member:
        up = [member for member in self._members if member.state == "up"]
        home = self._home.get(group)
        if home is None or home.state != "up":
            home = self._home[group] = min(up, key=_load)
        if home.free > 0:
            return home
        idle = min(up, key=_load)
        return idle if idle.free > 0 else home

    def _give_back(self, member: Member) -> None:
        """Free one place."""
        member.free += 1
        self._fill(member)

    def _fill(self, member: Member) -> None:
        """Give an engine's free places to those who wait for it, then to those who wait longest elsewhere."""
        while member.state == "up" and member.free > 0:
            queue = member.queue or max((other.queue for other in self._members), key=len)
            while queue and queue[0].done():  # cancelled
                queue.popleft()
            if not queue:
                if not any(other.queue for other in self._members):
                    return
                continue
            member.free -= 1
            queue.popleft().set_result(member)

    # ---- failures and recovery -----------------------------------------------------------------------------------

    def _strike(self, member: Member, cause: str) -> None:
        if member.state != "up":
            return
        member.strikes += 1
        server = member.engine.server
        if member.strikes >= STRIKES or (server is not None and not server.running):
            self._take_out(member, cause)

    def _take_out(self, member: Member, cause: str) -> None:
        if member.state in ("down", "lost"):
            return
        log.warning("%s is taken out: %s", member.engine.name, cause)
        member.cause = cause
        self._set(member, "down")
        member.recovery = asyncio.create_task(self._recover(member))

    async def _recover(self, member: Member) -> None:
        """Start the engine again until it is healthy, give it the current weights, take it back."""
        while member.restarts < self._servers.restarts:
            member.restarts += 1
            try:
                await self._restart(member.engine)
                async with self._updating:
                    current = self._version is None or await self._transport.resend(member.engine)
                    self._set(member, "up" if current else "stale")
                log.warning("%s is back%s", member.engine.name, "" if current else ", waiting for weights")
                return
            except RunError as e:
                member.cause = str(e)
        self._set(member, "lost")

    async def _restart(self, engine: RemoteEngine) -> None:
        if engine.server is not None:
            await engine.start()
            return
        await engine.drop()
        try:
            async with asyncio.timeout(self._servers.start_timeout):
                while True:
                    with suppress(RunError):
                        await engine.start()
                        return
                    await asyncio.sleep(1.0)  # somebody else's server: all we can do is look again
        except TimeoutError:
            raise DeadlineExceeded(f"{engine.name} to come back", self._servers.start_timeout) from None

    def _set(self, member: Member, state: State) -> None:
        member.state = state
        if state == "up":
            member.strikes = 0
            self._fill(member)
        else:
            for place in member.queue:
                if not place.done():
                    place.set_result(None)  # look elsewhere
            member.queue.clear()
        if state == "up" or all(m.state == "lost" for m in self._members):
            self._serving.set()

    async def _watch_health(self) -> None:
        """Somebody else's server hears from us in any state: by our silence it knows that we are gone, and ends."""
        while True:
            await asyncio.sleep(LOOK)
            await asyncio.gather(*(self._look(m) for m in self._members if m.state == "up" or m.engine.server is None))

    async def _look(self, member: Member) -> None:
        try:
            await member.engine.health()
        except RunError as e:
            self._strike(member, str(e))

    def _causes(self) -> str:
        return "; ".join(f"{m.engine.name} is {m.state}: {m.cause}" for m in self._members if m.state != "up")


def group_of(request_id: str) -> str:
    """The group of a request: of "STEP/PROMPT/INDEX|REQUEST", what precedes the last "/" of its lineage."""
    return lineage(request_id).rpartition("/")[0]


def _load(member: Member) -> int:
    return len(member.queue) - member.free
