"""What every engine behind HTTP shares: stops, resumption, aborts, weight versions, the server's life.

A `generate` call is one or more *segments*, each one request to the server. A segment ends where the server pauses: at
a possible stop, at an abort, at the budget. Then the call confirms, resumes or returns. While weights change, no
segment runs: those in flight are cut short and resumed under the new weights, so that each span has one version.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from megarl.config import Servers
from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling, hopeless
from megarl.rollout.servers.http import Endpoint, ServerError
from megarl.rollout.servers.process import POLL, Server
from megarl.rollout.stops import Match, Stops
from megarl.types import Span

HEALTH_DEADLINE = 15.0  # seconds for the server to list its models
CONTROL_DEADLINE = 120.0  # seconds for a control request: abort, pause, flush
ABORT_AGAIN = 1.0  # seconds after which requests that slipped past an abort are aborted once more


Named = tuple[str, torch.Tensor]


@dataclass(slots=True)
class Segment:
    """What one request brought: sampled tokens (matched stops included) and why the server paused."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length", "abort"]
    experts: np.ndarray | None = None  # as in `Generation`, of the whole sequence; None = not reported


class Digests(Protocol):
    """Digests of tensors as they are sent, in the form in which one kind of server reports its own."""

    def add(self, name: str, tensor: torch.Tensor) -> None: ...

    def differing(self, held: Mapping[str, Any]) -> list[str]:
        """The tensors of which a server's own digests, by its names, are others."""
        ...


@dataclass(slots=True)
class Outcome:
    """What a send achieved: checksums of what was read back, by name, and the engines that did not make it."""

    arrived: Mapping[str, int] = field(default_factory=dict)
    failures: dict[RemoteEngine, Exception] = field(default_factory=dict)
    sent_bytes: int = 0  # that left the trainer, per engine where each gets its own


class Transport(Protocol):
    """One way for weights. An engine that fails is reported in the outcome; the others still get the weights."""

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[RemoteEngine]) -> Outcome:
        """Bring `tensors` (Hugging Face names; drained in order, once) into every engine as weight `version`.

        Raises RunError, naming the tensor, where an engine holds something else than what was sent.
        """
        ...

    async def resend(self, engine: RemoteEngine) -> bool:
        """Give an engine that started anew the weights of the last send; False = it must wait for the next send."""
        ...

    async def close(self) -> None: ...


class RemoteEngine(ABC):
    """An `Engine` behind HTTP; a subclass speaks one server's dialect. Use from one event loop."""

    kind = "server"

    def __init__(
        self,
        name: str,
        address: str | Server,
        vocabulary: Vocabulary,
        servers: Servers,
        *,
        vocab_size: int,
        routed: tuple[int, int] | None = None,
        transport: Transport | None = None,
        api_key: str | None = None,
    ) -> None:
        """`address`: of a running server, or a `Server` that megarl starts, restarts and ends. `vocab_size`: the
        model's; the tokenizer's may be smaller. `routed`: a mixture of experts' layers and experts chosen a token."""
        self.name = name
        self.server = address if isinstance(address, Server) else None
        self.settings = servers
        self.version: int | None = None  # of the last weight update; None = the weights that the server loaded itself
        self.endpoint = Endpoint(address if isinstance(address, str) else address.address, api_key=api_key)
        self._api_key = api_key
        self._transport = transport
        self._vocabulary = vocabulary
        self._stops: dict[tuple, Stops] = {}
        self._vocab_size = vocab_size
        self._routed = routed
        self._open = asyncio.Event()  # clear while weights change
        self._open.set()
        self._segments: dict[str, asyncio.Task[Segment]] = {}  # request id → the segment in flight
        self._wanted: dict[str, str] = {}  # request id → the segment's id on the server
        self._aborted: set[str] = set()
        self._leftovers: set[asyncio.Task[None]] = set()  # aborts of requests that nobody waits for

    # ---- the Engine contract -------------------------------------------------------------------------------------

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """See `Engine.generate`. Raises ServerError, Refused or DeadlineExceeded; nothing is retried here."""
        if request_id in self._wanted:
            raise RunError(f"{self.name}: request id '{request_id}' is in use")
        self._check_tokens(token_ids)
        self._wanted[request_id] = ""
        try:
            return await self._generate(list(token_ids), sampling, request_id)
        finally:
            self._wanted.pop(request_id, None)
            self._aborted.discard(request_id)

    async def abort(self, request_id: str) -> None:
        if request_id in self._wanted:
            self._aborted.add(request_id)
            if server_id := self._wanted[request_id]:
                await self._abort(server_id)

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """See `Engine.update_weights`; the way the weights take is the `transport` given at the start."""
        if self._transport is None:
            raise RunError(f"{self.name}: no transport for weights was given to this engine")
        outcome = await self._transport.send(version, tensors, [self])
        if self in outcome.failures:
            raise outcome.failures[self]
        return outcome.arrived

    async def health(self) -> None:
        """One cheap request; raises RunError naming the engine."""
        if self.server is not None and not self.server.running:
            raise ServerError(f"{self.name}: the server has ended (log: {self.server.log}): {self.server.last_words()}")
        try:
            await self.endpoint.get("/v1/models", deadline=HEALTH_DEADLINE, purpose=f"{self.name} to list its models")
        except DeadlineExceeded:
            raise
        except RunError as e:
            raise ServerError(f"{self.name}: {e}") from None

    async def drop(self) -> None:
        """Cut every request in flight: their callers get a ServerError."""
        for task in list(self._segments.values()):
            task.cancel()
        await self.endpoint.close()

    async def close(self) -> None:
        for task in self._leftovers:
            task.cancel()
        await self.drop()
        if self.server is not None:
            await self.server.stop()

    @abstractmethod
    async def score(self, token_ids: Sequence[int]) -> list[float]: ...

    # ---- the server's life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start (or start again) the server that megarl owns, or look at the one that runs; returns when it generates.

        Raises RunError naming the cause, or DeadlineExceeded.
        """
        self.version = None
        if self.server is None:
            await self._await_health()
        else:
            await self.close()
            self.server.start()
            self.endpoint = Endpoint(self.server.address, api_key=self._api_key)
            await self.server.wait_until(self.health, self.settings.start_timeout)
        await self._first_token()

    async def _first_token(self) -> None:
        """A server that lists its models may still be unable to use them."""
        await self._segment("first-token", [0], Sampling(max_tokens=1))

    async def _await_health(self) -> None:
        """Somebody else's server may still be starting."""
        deadline, cause = self.settings.start_timeout, ""
        try:
            async with asyncio.timeout(deadline):
                while True:
                    try:
                        return await self.health()
                    except ServerError as e:
                        cause = str(e)
                    await asyncio.sleep(POLL)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} to become healthy ({cause})", deadline) from None

    # ---- weights -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def quiet(self, deadline: float = CONTROL_DEADLINE) -> AsyncIterator[None]:
        """Within, no segment runs: those in flight were cut short and resume afterwards under the new weights."""
        self._open.clear()
        try:
            waited = 0.0
            while self._segments:
                if waited >= deadline:
                    raise DeadlineExceeded(f"{self.name} to hand back {len(self._segments)} requests", deadline)
                await self._abort_all()
                if running := list(self._segments.values()):  # not all ended meanwhile
                    await asyncio.wait(running, timeout=ABORT_AGAIN)
                waited += ABORT_AGAIN
            yield
        finally:
            self._open.set()

    @abstractmethod
    async def load_folder(self, version: int, folder: Path) -> None:
        """Load the safetensors of `folder` in place of the weights; inside `quiet`."""

    def digests(self) -> Digests | None:
        """A collector of what is sent, for `verify`; None where the server cannot tell what it holds."""
        return None

    async def verify(self, sent: Digests) -> None:
        """Compare what the server holds with what was sent; raises RunError naming the tensors that differ."""
        for held in await self._held():
            if wrong := sent.differing(held):
                raise RunError(f"weights {self.version}: {self.name} does not hold what was sent: {', '.join(wrong)}")

    async def _held(self) -> Sequence[Mapping[str, Any]]:
        """Digests of what the server holds, of each of its ranks that can tell."""
        return ()

    # ---- dialect -------------------------------------------------------------------------------------------------

    @abstractmethod
    async def _segment(self, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        """One request: continue `token_ids` by at most `sampling.max_tokens`, pausing wherever a stop may be."""

    @abstractmethod
    async def _abort(self, server_id: str) -> None: ...

    @abstractmethod
    async def _abort_all(self) -> None: ...

    async def _post(self, path: str, payload: dict[str, Any] | None, purpose: str, deadline: float) -> Any:
        return await self.endpoint.post(path, payload, deadline=deadline, purpose=f"{self.name} to {purpose}")

    async def _tell(self, path: str, payload: dict[str, Any] | None, purpose: str) -> None:
        await self.endpoint.tell(path, payload, deadline=CONTROL_DEADLINE, purpose=f"{self.name} to {purpose}")

    # ---- one generate call ---------------------------------------------------------------------------------------

    async def _generate(self, context: list[int], sampling: Sampling, request_id: str) -> Generation:
        stops = self._stops_of(sampling)
        tokens, given, first = list(context), len(context), len(context) - sampling.offset
        logprobs: list[float] = []
        spans: list[Span] = []
        pending = sampling.offset > 0  # the text so far may end with a word that the next token confirms
        confirm = False
        experts: np.ndarray | None = None
        for number in range(2 * sampling.max_tokens + 2):
            await self._open.wait()
            if request_id in self._aborted:
                return Generation(tokens[given:], logprobs, "abort", spans=spans, experts=experts)
            made = len(tokens) - given
            room = 1 if confirm else sampling.max_tokens - made
            part = sampling._replace(max_tokens=room, offset=sampling.offset + made)
            segment = await self._run(request_id, f"{request_id}~{number}", tokens, part)
            if not segment.token_ids and segment.finish != "abort":
                raise ServerError(f"{self.name}: an answer without tokens (finish '{segment.finish}')")
            scanned = len(tokens)
            tokens += segment.token_ids
            logprobs += segment.logprobs
            experts = experts if segment.experts is None else segment.experts
            _mark(spans, self.version or 0, made, len(tokens) - given)
            match, end, pending = _find(stops, tokens, first, scanned, pending)
            if match is not None:
                kept = end - given
                spans = [Span(s.version, s.start, min(s.end, kept)) for s in spans if s.start < kept]
                start = None if isinstance(match.what, int) else match.start - given
                experts = None if experts is None else experts[: end - 1]
                return Generation(tokens[given:end], logprobs[:kept], "stop", match.what, start, spans, experts)
            if len(tokens) - given >= sampling.max_tokens:
                return Generation(tokens[given:], logprobs, "length", spans=spans, experts=experts)
            if hopeless(logprobs, sampling):
                return Generation(tokens[given:], logprobs, "abort", spans=spans, experts=experts)
            if segment.finish == "abort" and self._open.is_set() and request_id not in self._aborted:
                raise ServerError(f"{self.name}: the server aborted '{request_id}' by itself")
            confirm = pending
        raise ServerError(f"{self.name}: '{request_id}' makes no progress")

    def _stops_of(self, sampling: Sampling) -> Stops:
        key = Stops.key(sampling)
        if key not in self._stops:
            self._stops[key] = Stops(sampling, self._vocabulary, self._vocab_size)
        return self._stops[key]

    def _hints(self, sampling: Sampling) -> tuple[list[str], list[int]]:
        """Texts and token ids at which the server should pause for the stops of `sampling`, words left out.

        A sequence of tokens pauses it by its text; where that is no whole text, by its last token.
        """
        texts, ids = list(sampling.stop_texts), list(sampling.stop_token_ids)
        for sequence in sampling.stop_sequences:
            text = self._vocabulary.text(sequence)
            if "\ufffd" in text:
                ids.append(sequence[-1])
            else:
                texts.append(text)
        return texts, ids

    async def _run(self, request_id: str, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        """One segment as a task of its own, so that an abort can reach it; our own cancellation aborts it."""
        task = asyncio.ensure_future(self._segment(server_id, token_ids, sampling))
        self._segments[request_id] = task
        self._wanted[request_id] = server_id
        try:
            return await asyncio.shield(task)
        except DeadlineExceeded:
            self._abandon(server_id)
            raise
        except asyncio.CancelledError:
            if not task.cancelled():  # it is we who are cancelled
                task.cancel()
                self._abandon(server_id)
                raise
            return Segment([], [], "abort")  # `drop` cut the connection
        finally:
            del self._segments[request_id]
            self._wanted[request_id] = ""

    def _abandon(self, server_id: str) -> None:
        """Tell the server, beside all else, that nobody waits for this request any more."""

        async def abort() -> None:
            with suppress(RunError):
                await self._abort(server_id)

        task = asyncio.ensure_future(abort())
        self._leftovers.add(task)
        task.add_done_callback(self._leftovers.discard)

    def _check_version(self, versions: list[Any]) -> None:
        """An answer made with other weights than the current ones is refused: the server missed an update."""
        if self.version is not None and any(version != str(self.version) for version in versions):
            raise ServerError(f"{self.name}: answered with weights {versions}; the current ones are {self.version}")

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        """A token id that the model does not have ends an SGLang server: it is caught before it is sent."""
        if not token_ids:
            raise RunError(f"{self.name}: nothing to continue: the prompt has no token")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise RunError(f"{self.name}: token id {bad} is outside the model's vocabulary of {self._vocab_size}")


def field_of(answer: Any, *path: str) -> Any:
    """A field of a server's answer; ServerError where it is missing."""
    for key in path:
        if not isinstance(answer, dict) or key not in answer:
            raise ServerError(f"an answer without '{'.'.join(path)}': {str(answer)[:200]}")
        answer = answer[key]
    return answer


def _find(
    stops: Stops, tokens: Sequence[int], first: int, scanned: int, pending: bool
) -> tuple[Match | None, int, bool]:
    """The first stop that a token from index `scanned` on completes: (stop, tokens up to it, a word is pending)."""
    touched = np.flatnonzero(stops.touches[np.asarray(tokens[scanned:], dtype=np.int64)]) + scanned
    ahead = iter(touched.tolist())
    at = scanned if pending and scanned < len(tokens) else next(ahead, None)
    pending = pending and scanned == len(tokens)
    while at is not None:
        match, pending = stops.check(tokens, first, at + 1)
        if match is not None:
            return match, at + 1, False
        if pending and at + 1 < len(tokens):
            at, pending = at + 1, False
        else:
            at = next((i for i in ahead if i > at), None)
    return None, len(tokens), pending


def _mark(spans: list[Span], version: int, start: int, end: int) -> None:
    """Tokens [start, end) were made under `version`; joins the last span where it can."""
    if start == end:
        return
    if spans and spans[-1].version == version:
        start = spans.pop().start
    spans.append(Span(version, start, end))
