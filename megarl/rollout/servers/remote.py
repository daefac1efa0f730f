"""What every engine behind HTTP shares: stops, resumption, aborts, weight versions, the start and end of its server.

A `generate` call consists of one or more *segments*, each one request to the server. A segment ends where the server
stops: at a possible stop word, at an abort, at the token limit. The call then returns, or continues with the next
segment. While weights change, no segment runs: those in flight are aborted and continue under the new weights. So each
span of tokens has one weight version.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megarl.config import Servers
from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling, cannot_pass
from megarl.rollout.in_engine.megarl_guard import LEAVE
from megarl.rollout.servers.http import Endpoint, Run, ServerError, Taken, WrongKey
from megarl.rollout.servers.process import Server, retry
from megarl.rollout.stops import Match, Stops
from megarl.rollout.weights.transport import Digests, NotAsSent, Transport, transfer_timeout
from megarl.types import Span

HEALTH_TIMEOUT = 15.0  # seconds for the server to list its models
CONTROL_TIMEOUT = 120.0  # seconds for a control request: abort, pause, flush
ABORT_AGAIN = 1.0  # seconds after which requests that arrived after an abort are aborted too
CLAIM_PERIOD = 0.5  # seconds between questions whether a server has forgotten a run that was killed
LEAVE_TIMEOUT = 5.0  # seconds for a server that we did not start to hear that we leave


@dataclass(slots=True)
class Segment:
    """The answer to one request: the sampled tokens, matched stops included, and why the server stopped."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length", "abort"]
    experts: np.ndarray | None = None  # as in `Generation`, for the whole sequence; None: not reported


class RemoteEngine(ABC):
    """An `Engine` behind HTTP. A subclass speaks one server's protocol. Use from one event loop."""

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
        run: Run | None = None,
    ) -> None:
        """`address`: a running server's, or a `Server` that megarl starts, restarts and stops.

        `vocab_size`: the model's; the tokenizer's may be smaller. `routed`: (layers, experts per token) of a mixture of
        experts. `run`: whose engine it is; default, a new one.
        """
        self.name = name
        self.server = address if isinstance(address, Server) else None
        self.settings = servers
        self.version: int | None = None  # of the last update; None = the weights that the server loaded itself
        self.in_flight: dict[str, asyncio.Task[Segment]] = {}  # request id → its running segment
        self._api_key = api_key
        self._run_id = run or Run.new("without a name")
        self.endpoint = self._endpoint(address if isinstance(address, str) else address.address)
        self._transport = transport
        self._vocabulary = vocabulary
        self._stops: dict[tuple, Stops] = {}
        self._vocab_size = vocab_size
        self._routed = routed
        self._resumed = asyncio.Event()  # clear while paused
        self._resumed.set()
        self._server_ids: dict[str, str] = {}  # request id → the id of its running segment at the server, or ""
        self._aborted: set[str] = set()
        self._background: set[asyncio.Task[None]] = set()  # aborts of segments that nobody waits for

    # ---- the Engine contract -------------------------------------------------------------------------------------

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """See `Engine.generate`. Raises ServerError, Refused or DeadlineExceeded. Retries nothing."""
        if request_id in self._server_ids:
            raise RunError(f"{self.name}: request id '{request_id}' is in use")
        self._check_tokens(token_ids)
        self._server_ids[request_id] = ""
        try:
            return await self._generate(list(token_ids), sampling, request_id)
        finally:
            self._server_ids.pop(request_id, None)
            self._aborted.discard(request_id)

    async def abort(self, request_id: str) -> None:
        if request_id in self._server_ids:
            self._aborted.add(request_id)
            if server_id := self._server_ids[request_id]:
                await self.abort_segment(server_id)

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """See `Engine.update_weights`. Sends by the `transport` that the engine was made with."""
        if self._transport is None:
            raise RunError(f"{self.name}: this engine was made without a weight transport")
        outcome = await self._transport.send(version, tensors, [self])
        if self in outcome.failures:
            raise outcome.failures[self]
        return outcome.arrived

    async def health(self) -> None:
        """One cheap request. Raises RunError naming the engine."""
        if self.server is not None:
            if not self.server.running:
                words = self.server.last_words()
                raise ServerError(f"{self.name}: the server has ended (log: {self.server.log}): {words}")
            self.server.check_listener()
        try:
            await self.endpoint.get("/v1/models", timeout=HEALTH_TIMEOUT, purpose=f"{self.name} to list its models")
        except (DeadlineExceeded, WrongKey, Taken):
            raise
        except RunError as e:
            raise ServerError(f"{self.name}: {e}") from None

    async def drop(self) -> None:
        """Cut every request in flight. Their callers get a ServerError."""
        for task in list(self.in_flight.values()):
            task.cancel()
        await self.endpoint.close()

    async def close(self) -> None:
        for task in self._background:
            task.cancel()
        if self.server is None:
            with suppress(RunError):  # it may be gone, or serve another run
                await self.endpoint.post(LEAVE, timeout=LEAVE_TIMEOUT, purpose="leave", decode=False)
        await self.drop()
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)

    @abstractmethod
    async def score(self, token_ids: Sequence[int]) -> list[float]: ...

    # ---- starting ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start or restart our server, or connect to a running one. Returns when it can generate.

        Raises RunError naming the cause, or DeadlineExceeded. Raises Taken if the server serves another run.
        """
        self.version = None
        if self.server is None:
            await retry(self._claim, self.settings.start_timeout, f"{self.name} to become healthy")
        else:
            await self.close()
            self.server.start()
            self.endpoint = self._endpoint(self.server.address)
            await self.server.wait_until(self.health, self.settings.start_timeout)
        await self._first_token()

    def _endpoint(self, address: str) -> Endpoint:
        check = self.server.check_listener if self.server is not None else lambda: None
        return Endpoint(address, api_key=self._api_key, run=self._run_id, check=check)

    async def _claim(self) -> None:
        """`health`, which takes the server for our run. A run that was killed is waited out: the server forgets it."""
        begun = time.monotonic()
        while True:
            try:
                await self.health()
                return
            except Taken as e:
                if e.heard < time.monotonic() - begun:  # since we first asked
                    raise
            await asyncio.sleep(CLAIM_PERIOD)

    async def _first_token(self) -> None:
        """A server that lists its models may still be unable to use them."""
        await self.segment("first-token", [0], Sampling(max_tokens=1))

    # ---- weights -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def pause(self, timeout: float = CONTROL_TIMEOUT) -> AsyncIterator[None]:
        """No segment runs in the body. Those in flight are aborted, and continue afterwards under the new weights.

        Raises DeadlineExceeded after about `timeout` seconds.
        """
        self._resumed.clear()
        try:
            waited = 0.0
            while self.in_flight:
                if waited >= timeout:
                    raise DeadlineExceeded(f"{self.name} to return {len(self.in_flight)} requests", timeout)
                await self.abort_all()
                if running := list(self.in_flight.values()):  # they may have ended meanwhile
                    await asyncio.wait(running, timeout=ABORT_AGAIN)
                waited += ABORT_AGAIN
            yield
        finally:
            self._resumed.set()

    @abstractmethod
    async def load_folder(self, version: int, folder: Path) -> None:
        """Replace the weights by the safetensors of `folder`. Call while paused. See `load_timeout`."""

    @staticmethod
    def load_timeout(folder: Path) -> float:
        """Seconds for a server to load `folder`: each of its ranks reads, and perhaps checksums, every byte."""
        return CONTROL_TIMEOUT + transfer_timeout(sum(file.stat().st_size for file in folder.glob("*.safetensors")))

    def label(self, version: int | None) -> str:
        """Weight version `version` as the server knows it: with the run's id, for other runs count theirs too."""
        return f"{self._run_id.id}-{version}"

    def digests(self) -> Digests | None:
        """An empty collection for `verify`. None if the server cannot report digests of its weights."""
        return None

    async def verify(self, sent: Digests) -> None:
        """Compare the server's weights with what was sent. Raises NotAsSent naming the tensors that differ."""
        for reported in await self.reported_digests():
            if wrong := sent.differing(reported):
                raise NotAsSent(f"weights {self.version}: {self.name} does not hold what was sent: {', '.join(wrong)}")

    async def reported_digests(self) -> Sequence[Mapping[str, Any]]:
        """Digests of the server's weights by name, one mapping for each of its ranks that can tell."""
        return ()

    # ---- the server's protocol -----------------------------------------------------------------------------------

    @abstractmethod
    async def segment(self, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        """One request: continue `token_ids` by at most `sampling.max_tokens`, ending wherever a stop may be."""

    @abstractmethod
    async def abort_segment(self, server_id: str) -> None: ...

    @abstractmethod
    async def abort_all(self) -> None: ...

    async def _post(self, path: str, payload: dict[str, Any] | None, purpose: str, timeout: float) -> Any:
        return await self.endpoint.post(path, payload, timeout=timeout, purpose=f"{self.name} to {purpose}")

    async def _tell(self, path: str, payload: dict[str, Any] | None, purpose: str) -> None:
        """POST whose answer is ignored."""
        purpose = f"{self.name} to {purpose}"
        await self.endpoint.post(path, payload, timeout=CONTROL_TIMEOUT, purpose=purpose, decode=False)

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
            await self._resumed.wait()
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
            _add_span(spans, self.version or 0, made, len(tokens) - given)
            match, end, pending = _find(stops, tokens, first, scanned, pending)
            if match is not None:
                kept = end - given
                spans = [Span(s.version, s.start, min(s.end, kept)) for s in spans if s.start < kept]
                start = None if isinstance(match.what, int) else match.start - given
                experts = None if experts is None else experts[: end - 1]
                return Generation(tokens[given:end], logprobs[:kept], "stop", match.what, start, spans, experts)
            if len(tokens) - given >= sampling.max_tokens:
                return Generation(tokens[given:], logprobs, "length", spans=spans, experts=experts)
            if cannot_pass(logprobs, sampling):
                return Generation(tokens[given:], logprobs, "abort", spans=spans, experts=experts)
            if segment.finish == "abort" and self._resumed.is_set() and request_id not in self._aborted:
                raise ServerError(f"{self.name}: the server aborted '{request_id}' by itself")
            confirm = pending
        raise ServerError(f"{self.name}: '{request_id}' makes no progress")

    def _stops_of(self, sampling: Sampling) -> Stops:
        key = Stops.key(sampling)
        if key not in self._stops:
            self._stops[key] = Stops(sampling, self._vocabulary, self._vocab_size)
        return self._stops[key]

    def _stop_hints(self, sampling: Sampling) -> tuple[list[str], list[int]]:
        """Texts and token ids at which the server should stop for the stops of `sampling`, words left out.

        A token sequence stops it by its text, or by its last token where the sequence is no valid text.
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
        """Run one segment as a task, so that `drop` can cancel it. If we are cancelled, the server aborts it."""
        task = asyncio.ensure_future(self.segment(server_id, token_ids, sampling))
        self.in_flight[request_id] = task
        self._server_ids[request_id] = server_id
        try:
            return await asyncio.shield(task)
        except DeadlineExceeded:
            self._abandon(server_id)
            raise
        except asyncio.CancelledError:
            if not task.cancelled():  # we are cancelled, not the task
                task.cancel()
                self._abandon(server_id)
                raise
            return Segment([], [], "abort")  # `drop` cut the connection
        finally:
            del self.in_flight[request_id]
            self._server_ids[request_id] = ""

    def _abandon(self, server_id: str) -> None:
        """Tell the server, in the background, that nobody waits for this segment any more."""

        async def abort() -> None:
            with suppress(RunError):
                await self.abort_segment(server_id)

        task = asyncio.ensure_future(abort())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _check_version(self, versions: list[Any]) -> None:
        """Refuse an answer made with other weights than the current ones: the server missed an update."""
        current = self.label(self.version)
        if self.version is not None and any(version != current for version in versions):
            raise ServerError(f"{self.name}: answered with weights {versions}; the current ones are '{current}'")

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        """A token id outside the model's vocabulary crashes an SGLang server, so we check before we send."""
        if not token_ids:
            raise RunError(f"{self.name}: nothing to continue: the prompt has no token")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise RunError(f"{self.name}: token id {bad} is outside the model's vocabulary of {self._vocab_size}")


def field_of(answer: Any, *path: str) -> Any:
    """A field of a server's answer. Raises ServerError if it is missing."""
    for key in path:
        if not isinstance(answer, dict) or key not in answer:
            raise ServerError(f"an answer without '{'.'.join(path)}': {str(answer)[:200]}")
        answer = answer[key]
    return answer


def _find(
    stops: Stops, tokens: Sequence[int], first: int, scanned: int, pending: bool
) -> tuple[Match | None, int, bool]:
    """The first stop that a token from index `scanned` on completes: (stop, tokens up to it, a word is pending)."""
    touched = np.flatnonzero(stops.stop_candidates[np.asarray(tokens[scanned:], dtype=np.int64)]) + scanned
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


def _add_span(spans: list[Span], version: int, start: int, end: int) -> None:
    """Record that tokens [start, end) were made under `version`. Extends the last span if it has that version."""
    if start == end:
        return
    if spans and spans[-1].version == version:
        start = spans.pop().start
    spans.append(Span(version, start, end))
