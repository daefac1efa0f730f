"""Many engines behind the one `Engine` contract: routing, bounded concurrency, retries, recovery."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from megarl.config import Servers
from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.engine import Generation, Sampling, lineage
from megarl.rollout.servers.http import Refused
from megarl.rollout.servers.process import retry
from megarl.rollout.servers.remote import RemoteEngine
from megarl.rollout.weights.transport import Broken, Checks, Named, NotAsSent, NotDelivered, Outcome, Transport

log = logging.getLogger(__name__)

MAX_FAILURES = 3  # in a row, after which an engine is taken out
HEALTH_PERIOD = 10.0  # seconds between checks of an engine's health
MAX_DISAGREEMENT = 0.1  # of two engines' log-probs of the same tokens under the same weights (bf16)
CLOSE_TIMEOUT = 60.0  # seconds for all engines to end; a server gets 20

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
    is taken out. It is restarted (if megarl started it), given the current weights, checked as at the send of them, and
    taken back. That is so in an update of the weights too.
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
        self._canary: tuple[Sequence[int], list[float]] | None = None  # what the engines scored last, and its scores
        self._updating = asyncio.Lock()
        self._health_checks: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start every engine and the health checks. Raises RunError if one does not start."""
        starting = [asyncio.ensure_future(member.engine.start()) for member in self.members]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
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
        """Scored by every engine that serves. Raises RunError if two disagree by more than `MAX_DISAGREEMENT`.

        An engine that fails is taken out. Raises NotDelivered if no engine with the weights is left.
        """
        while True:
            await self._wait_for_one()
            serving = [member for member in self.members if member.state == "up"]
            scored = await asyncio.gather(*(m.engine.score(token_ids) for m in serving), return_exceptions=True)
            first: tuple[str, list[float]] | None = None
            for member, scores in zip(serving, scored, strict=True):
                if isinstance(scores, RunError) and not isinstance(scores, Refused):
                    self._take_out(member, str(scores))
                elif isinstance(scores, BaseException):
                    raise scores
                elif first is None:
                    first = (member.engine.name, scores)
                else:
                    self._check_agreement(member.engine, scores, *first)
            if first is not None:
                self._canary = token_ids, first[1]
                return first[1]

    def _check_agreement(self, engine: RemoteEngine, scores: list[float], other: str, expected: list[float]) -> None:
        worst = max((abs(a - b) for a, b in zip(expected, scores, strict=True)), default=0.0)
        if not worst <= MAX_DISAGREEMENT:
            raise RunError(
                f"{engine.name} and {other} disagree by {worst:.3g} on the log-probs of the same tokens under weights "
                f"{engine.version}"
            )

    async def abort(self, request_id: str) -> None:
        if running := self._running.get(request_id):
            member, name = running
            await member.engine.abort(name)

    async def update_weights(self, version: int, tensors: Iterable[Named]) -> Mapping[str, int]:
        """One send to all engines. Takes out those that fail, and waits for them if none is left.

        Raises NotDelivered if those that come back need another send, RunError if none comes back.
        """
        async with self._updating:
            receivers = [member for member in self.members if member.state in ("up", "stale")]
            outcome = await self._send(version, self._checks.of(version, tensors), receivers)
            self._version, self._canary = version, None
            self._home.clear()  # the caches are empty now
            for member in receivers:
                if outcome is None:
                    self._set_state(member, "stale")
                elif failure := outcome.failures.get(member.engine):
                    self._take_out(member, f"weights {version}: {failure}", final=isinstance(failure, Refused))
                else:
                    self._set_state(member, "up")
        await self._wait_for_one()
        return outcome.arrived if outcome is not None else {}

    async def _send(self, version: int, tensors: Iterable[Named], receivers: list[Member]) -> Outcome | None:
        """One send. None if it broke for all `receivers`. Those that died then leave the list.

        If all live, as one may have been started again meanwhile, it costs each of them a restart, so that this ends.
        """
        try:
            return await self.transport.send(version, tensors, [member.engine for member in receivers])
        except Broken as e:
            alive = await asyncio.gather(*(self._lives(member.engine) for member in receivers))
            for member, lives in zip(list(receivers), alive, strict=True):
                if lives and (not all(alive) or member.restarts < self._servers.restarts):
                    member.restarts += all(alive)
                else:
                    receivers.remove(member)
                    self._take_out(member, f"weights {version}: {e}")
            return None

    async def _lives(self, engine: RemoteEngine) -> bool:
        try:
            await engine.health()
        except RunError:
            return False
        return True

    async def _wait_for_one(self) -> None:
        """Wait until an engine serves or none is being restarted. Raises NotDelivered if the others need a send,
        RunError if all are lost."""
        while not self.engines:
            recovering = [m.recovery for m in self.members if m.recovery is not None and not m.recovery.done()]
            if any(m.state == "stale" for m in self.members):
                raise NotDelivered(f"no engine has weights {self._version}: {self._causes()}")
            if not recovering:
                raise RunError(f"weights {self._version} reached no engine: {self._causes()}")
            await asyncio.wait(recovering, return_when=asyncio.FIRST_COMPLETED)

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
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await asyncio.gather(*tasks, return_exceptions=True)
                closing = [self.transport.close(), *(member.engine.close() for member in self.members)]
                closed = await asyncio.gather(*closing, return_exceptions=True)
        except TimeoutError:
            raise DeadlineExceeded("the engines to end", CLOSE_TIMEOUT) from None
        for failure in closed:
            if isinstance(failure, BaseException):
                raise failure

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

    def _take_out(self, member: Member, cause: str, *, final: bool = False) -> None:
        """`final`: a restart would not help."""
        if member.state in ("down", "lost"):
            return
        log.warning("%s is taken out: %s", member.engine.name, cause)
        member.cause = cause
        if final:
            self._set_state(member, "lost")
            return
        self._set_state(member, "down")
        member.recovery = asyncio.create_task(self._recover(member))

    async def _recover(self, member: Member) -> None:
        """Restart the engine until it is healthy, give it the current weights, check them, and take it back."""
        while member.restarts < self._servers.restarts:
            member.restarts += 1
            try:
                await self._restart(member.engine)
                async with self._updating:
                    current = self._version is None or await self.transport.resend(member.engine)
                    if current and self._canary is not None:
                        tokens, expected = self._canary
                        scores = await member.engine.score(tokens)
                        self._check_agreement(member.engine, scores, "the engines before it", expected)
                    self._set_state(member, "up" if current else "stale")
                log.warning("%s is back%s", member.engine.name, "" if current else ", waiting for weights")
                return
            except (Refused, NotAsSent) as e:  # a wrong key, another run's server, a damaged folder: it stays so
                member.cause = str(e)
                break
            except Exception as e:  # of one engine; the others go on
                member.cause = str(e) if isinstance(e, RunError) else f"{type(e).__name__}: {e}"
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
