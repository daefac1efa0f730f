"""Many engines behind the one `Engine` contract: routing, bounded concurrency, retries, recovery."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import torch

from megarl.config import Servers
from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.engine import Generation, Sampling, lineage
from megarl.rollout.servers.http import Refused
from megarl.rollout.servers.process import retry
from megarl.rollout.servers.remote import RemoteEngine
from megarl.rollout.weights.transport import Checks, Transport

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row, after which an engine is taken out
HEALTH_PERIOD = 10.0  # seconds between checks of an engine's health
MAX_DISAGREEMENT = 0.1  # of two engines' log-probs of the same tokens under the same weights (bf16)

State = Literal["up", "down", "stale", "lost"]  # serving; recovering; healthy without the weights; given up


@dataclass(eq=False)
class Member:
    """One engine and what the pool knows about it."""

    engine: RemoteEngine
    free: int  # requests that it can take now
    state: State = "up"
    failures: int = 0  # in a row
    restarts: int = 0
    cause: str = ""  # of the last failure
    queue: deque[asyncio.Future[Member | None]] = field(default_factory=deque)
    recovery: asyncio.Task[None] | None = None


class Pool:
    """Satisfies `Engine`. Use from one event loop. Call `start` before the first request.

    Routing: the requests of a group share its prompt and go to one engine while it has room. Another engine takes them
    only when it has nothing else to do. Each engine has at most `servers.concurrency` requests at once.
    Failures: a failed request starts again on another engine, so a caller gets exactly one result. A request that a
    server rejects as wrong is not retried. An engine whose requests or health checks fail `MAX_FAILURES` times in a row
    is taken out. It is restarted (if megarl started it), given the current weights, and taken back.
    """

    def __init__(
        self, engines: Sequence[RemoteEngine], transport: Transport, servers: Servers, *, tied: bool = False
    ) -> None:
        """`tied`: the model's output layer is its embedding."""
        self.retries = 0  # requests sent again after a failure
        self.members = [Member(engine, servers.concurrency) for engine in engines]
        self.transport = transport
        self._servers = servers
        self._checks = Checks(tied)
        self._home: dict[str, Member] = {}  # group → the engine that has its prefix
        self._running: dict[str, tuple[Member, str]] = {}  # request id → its engine, and its id there
        self._serving = asyncio.Event()  # an engine is up, or none will ever be
        self._serving.set()
        self._version: int | None = None  # of the last send
        self._updating = asyncio.Lock()
        self._health_checks: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start every engine and the health checks. Raises RunError if one does not start."""
        try:
            await asyncio.gather(*(member.engine.start() for member in self.members))
        except BaseException:
            await self.close()
            raise
        self._health_checks = asyncio.create_task(self._check_health())

    @property
    def engines(self) -> list[RemoteEngine]:
        """The engines that serve now."""
        return [member.engine for member in self.members if member.state == "up"]

    # ---- the Engine contract -------------------------------------------------------------------------------------

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """See `Engine.generate`. Raises DeadlineExceeded after `servers.request_timeout`, retries included."""
        timeout = self._servers.request_timeout
        cause = "no engine became free"
        try:
            async with asyncio.timeout(timeout):
                for attempt in count():
                    member = await self._acquire(request_id)
                    name = f"{request_id}^{attempt}" if attempt else request_id
                    self._running[request_id] = (member, name)
                    try:
                        generation = await member.engine.generate(token_ids, sampling, name)
                        member.failures = 0
                        return generation
                    except Refused:
                        raise
                    except RunError as e:
                        cause = str(e)
                        self.retries += 1
                        self._record_failure(member, cause)
                    finally:
                        self._running.pop(request_id, None)
                        self._release(member)
        except TimeoutError:
            pass
        raise DeadlineExceeded(f"'{request_id}' (last: {cause})", timeout)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Scored by every engine that serves. Raises RunError if two disagree by more than `MAX_DISAGREEMENT`."""
        engines = self.engines
        await self.health()
        first, *others = await asyncio.gather(*(engine.score(token_ids) for engine in engines))
        for engine, scores in zip(engines[1:], others, strict=True):
            worst = max((abs(a - b) for a, b in zip(first, scores, strict=True)), default=0.0)
            if not worst <= MAX_DISAGREEMENT:
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
        """One send to all engines. Takes out those that fail. Raises RunError if none is left."""
        async with self._updating:
            receivers = [member for member in self.members if member.state in ("up", "stale")]
            outcome = await self.transport.send(
                version, self._checks.of(version, tensors), [member.engine for member in receivers]
            )
            self._version = version
            self._home.clear()  # the caches are empty now
            for member in receivers:
                if member.engine in outcome.failures:
                    self._take_out(member, f"weights {version}: {outcome.failures[member.engine]}")
                else:
                    self._set_state(member, "up")
        if not self.engines:
            raise RunError(f"weights {version} reached no engine: {self._causes()}")
        return outcome.arrived

    async def checksums(self) -> Mapping[str, int]:
        """None: servers report theirs when they load, and the transport compares them there."""
        return {}

    async def health(self) -> None:
        """Raises RunError if no engine serves."""
        if not self.engines:
            raise RunError(f"no engine serves: {self._causes()}")

    async def close(self) -> None:
        tasks = [task for task in (self._health_checks, *(member.recovery for member in self.members)) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.transport.close()
        await asyncio.gather(*(member.engine.close() for member in self.members))

    # ---- routing -------------------------------------------------------------------------------------------------

    async def _acquire(self, request_id: str) -> Member:
        """Wait until an engine that serves can take the request, and count it there."""
        while True:
            while not self.engines:
                if all(member.state == "lost" for member in self.members):
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
                    self._release(given)
                raise
            if given is not None:
                return given

    def _route(self, group: str) -> Member:
        up = [member for member in self.members if member.state == "up"]
        home = self._home.get(group)
        if home is None or home.state != "up":
            home = self._home[group] = min(up, key=_load)
        if home.free > 0:
            return home
        idle = min(up, key=_load)
        return idle if idle.free > 0 else home

    def _release(self, member: Member) -> None:
        """One request of the engine has ended."""
        member.free += 1
        self._admit(member)

    def _admit(self, member: Member) -> None:
        """Admit waiting requests: first those that wait for this engine, then those of the longest queue."""
        while member.state == "up" and member.free > 0:
            queue = member.queue or max((other.queue for other in self.members), key=len)
            while queue and queue[0].done():  # cancelled
                queue.popleft()
            if not queue:
                if not any(other.queue for other in self.members):
                    return
                continue
            member.free -= 1
            queue.popleft().set_result(member)

    # ---- failures and recovery -----------------------------------------------------------------------------------

    def _record_failure(self, member: Member, cause: str) -> None:
        if member.state != "up":
            return
        member.failures += 1
        server = member.engine.server
        if member.failures >= MAX_FAILURES or (server is not None and not server.running):
            self._take_out(member, cause)

    def _take_out(self, member: Member, cause: str) -> None:
        if member.state in ("down", "lost"):
            return
        log.warning("%s is taken out: %s", member.engine.name, cause)
        member.cause = cause
        self._set_state(member, "down")
        member.recovery = asyncio.create_task(self._recover(member))

    async def _recover(self, member: Member) -> None:
        """Restart the engine until it is healthy, give it the current weights, and take it back."""
        while member.restarts < self._servers.restarts:
            member.restarts += 1
            try:
                await self._restart(member.engine)
                async with self._updating:
                    current = self._version is None or await self.transport.resend(member.engine)
                    self._set_state(member, "up" if current else "stale")
                log.warning("%s is back%s", member.engine.name, "" if current else ", waiting for weights")
                return
            except RunError as e:
                member.cause = str(e)
        self._set_state(member, "lost")

    async def _restart(self, engine: RemoteEngine) -> None:
        if engine.server is not None:
            await engine.start()
            return
        await engine.drop()
        timeout = self._servers.start_timeout
        await retry(engine.start, timeout, f"{engine.name} to come back", period=1.0)  # all that we can do

    def _set_state(self, member: Member, state: State) -> None:
        member.state = state
        if state == "up":
            member.failures = 0
            self._admit(member)
        else:
            for place in member.queue:
                if not place.done():
                    place.set_result(None)  # route again
            member.queue.clear()
        if state == "up" or all(m.state == "lost" for m in self.members):
            self._serving.set()

    async def _check_health(self) -> None:
        """Keep polling servers we did not start, in any state: they shut down when no client contacts them."""
        while True:
            await asyncio.sleep(HEALTH_PERIOD)
            polled = (m for m in self.members if m.state == "up" or m.engine.server is None)
            await asyncio.gather(*map(self._check, polled))

    async def _check(self, member: Member) -> None:
        try:
            await member.engine.health()
        except RunError as e:
            self._record_failure(member, str(e))

    def _causes(self) -> str:
        return "; ".join(f"{m.engine.name} is {m.state}: {m.cause}" for m in self.members if m.state != "up")


def group_of(request_id: str) -> str:
    """The group of a request: of "STEP/PROMPT/INDEX|REQUEST", what precedes the last "/" of its lineage."""
    return lineage(request_id).rpartition("/")[0]


def _load(member: Member) -> int:
    return len(member.queue) - member.free
