"""Step-GRPO's dynamic truncated rollout (arXiv 2604.16890): think, probe at step markers, decide, answer.

One coroutine per completion, over the Engine contract only. Completions never wait for each other. Everything works on
token ids: a declined marker keeps its sampled tokens, so nothing can be doubled or lost. After an exit, what follows
the finished step is cut off and `closing` inserted. An engine always gets a prefix of the response, or, for a probe, a
prefix followed by the inducer.
"""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import dataclass
from typing import TypeVar

from megarl.rollout.early_exit.completion_builder import CompletionBuilder
from megarl.rollout.early_exit.plan import ExitReason, Plan
from megarl.rollout.engine import Engine, Generation, Sampling, cannot_pass
from megarl.types import Completion, Finish, Probe, Prompt, derive_seed

T = TypeVar("T")


async def complete(engine: Engine, prompt: Prompt, index: int, plan: Plan, seed: int, name: str) -> Completion:
    """One completion under early exit; `name` begins its request ids."""
    thinker = _Thinker(engine, prompt, plan, seed, name)
    reason, finish = await thinker.run()
    return thinker.builder.build(prompt.uid, index, finish, reason, plan.vocabulary)


@dataclass(frozen=True, slots=True)
class _Marker:
    """A step marker in the response: the token where it begins, that token's text before it, the words of the step that
    it ends."""

    token: int
    before: bytes
    words: frozenset[str]


class _Thinker:
    """The run of one completion."""

    def __init__(self, engine: Engine, prompt: Prompt, plan: Plan, seed: int, name: str) -> None:
        self.engine, self.plan, self.seed, self.name = engine, plan, seed, name
        self.builder = CompletionBuilder(prompt.token_ids)
        self._requests = 0
        self._step = (0, 0)  # where the current step begins: response token, bytes into it

    async def run(self) -> tuple[ExitReason, Finish]:
        settings = self.plan.settings
        repeats, words = 0, None
        generation = await self._think(self._request())
        while True:
            start = len(self.builder)
            self.builder.append(generation)
            if reason := self._natural_end(generation):
                return await self._finish(reason)
            assert isinstance(generation.matched_stop, str) and generation.stop_start is not None
            marker = self._marker(start + generation.stop_start, generation.matched_stop)
            repeats += marker.words == words
            words = marker.words
            if repeats >= settings.repetition_limit:
                return await self._exit(ExitReason.REPETITION, marker)
            if self.plan.thinking_budget - marker.token <= settings.near_budget:
                return await self._exit(ExitReason.NEAR_BUDGET, marker)
            if len(self.builder) >= self.plan.thinking_budget:
                return await self._finish(ExitReason.BUDGET)
            if settings.schedule == "speculative":
                accepted, generation = await self._probe_beside(marker)
            elif not (accepted := await self._probe(marker)):
                generation = await self._think(self._request())
            if accepted:
                return await self._exit(ExitReason.CONFIDENT, marker)

    def _natural_end(self, generation: Generation) -> ExitReason | None:
        """Why the thought is over without an exit at a marker; None at a marker."""
        if generation.finish == "abort":
            return ExitReason.ABORTED
        if generation.finish == "length":
            return ExitReason.BUDGET
        if self.plan.ends(generation):
            return ExitReason.END_OF_TEXT
        return ExitReason.THINK_END if self.plan.closes(generation) else None

    def _marker(self, token: int, word: str) -> _Marker:
        """The marker that begins in response token `token`. The next step begins behind it."""
        response, bytes_of = self.builder.response, self.plan.vocabulary.bytes_of
        previous = bytes_of(response[max(0, token - 4) : token])[-1:]
        tail = previous + bytes_of(response[token:])
        found = re.search(rb"(?<![A-Za-z])%s(?![A-Za-z])" % re.escape(word.encode()), tail)
        assert found, f"the engine stopped at {word!r}, which does not begin in token {token}"
        before = tail[len(previous) : found.start()]
        began, skip = self._step
        step = bytes_of(response[began:token]) + before
        self._step = (token, found.end() - len(previous))
        return _Marker(token, before, frozenset(step[skip:].decode(errors="ignore").split(" ")))

    # ---- asking the engine

    def _request(self, kind: str = "") -> str:
        """A new request id."""
        self._requests += 1
        return f"{self.name}|{kind}{self._requests}"

    async def _think(self, request: str, probes_under_way: int = 0) -> Generation:
        """Go on thinking until a marker, `think_end`, the end of the text or the thinking budget."""
        settings = self.plan.settings
        asking = len(self.builder.probes) + probes_under_way < settings.max_probes
        sampling = self.plan.thought_stops._replace(
            max_tokens=self.plan.thinking_budget - len(self.builder),
            seed=self.seed,
            offset=len(self.builder),
            stop_words=tuple(settings.markers) if asking else (),
        )
        return await self.engine.generate(self.builder.token_ids, sampling, request)

    async def _probe(self, marker: _Marker) -> bool:
        """Ask for a trial answer at the finished step and record it. True if its confidence passes the threshold."""
        settings, plan = self.plan.settings, self.plan
        question = [*self.builder.prefix(marker.token), *self._partial(marker), *plan.inducer]
        sampling = (plan.sampling if settings.variant == "paper_text" else plan.thought_stops)._replace(
            max_tokens=settings.probe_tokens,
            temperature=settings.probe_temperature,
            top_p=1.0,
            top_k=0,
            seed=derive_seed(self.seed, "probe", len(self.builder.probes)),
            offset=len(question) - len(self.builder.prefix(0)),
            scratch=True,
            min_logprob=plan.min_logprob,
            experts=False,
        )
        trial = await self.engine.generate(question, sampling, self._request("probe"))
        confidence = self._confidence(trial, sampling)
        accepted = confidence > settings.threshold
        self.builder.probes.append(Probe(marker.token, tuple(trial.token_ids), confidence, accepted))
        return accepted

    async def _probe_beside(self, marker: _Marker) -> tuple[bool, Generation]:
        """Probe while the thought goes on. An accepted probe discards the continuation."""
        request = self._request()
        going_on = asyncio.ensure_future(self._think(request, probes_under_way=1))
        probing = asyncio.ensure_future(self._probe(marker))
        try:
            accepted = await probing
            if accepted:
                await self.engine.abort(request)
            generation = await going_on
        finally:
            for task in (going_on, probing):
                task.cancel()
        if accepted:
            self.builder.discarded += len(generation.token_ids)
        return accepted, generation

    def _confidence(self, trial: Generation, sampling: Sampling) -> float:
        """Mean probability of the trial's tokens, without the first; 0 for a trial that did not close, if strict. For a
        trial that was rejected early, the mean over the tokens it had, which is below the threshold."""
        settings = self.plan.settings
        closed = self.plan.ends(trial) if settings.variant == "paper_text" else self.plan.closes(trial)
        rest = trial.logprobs[1:]
        rejected = trial.finish == "abort" and cannot_pass(trial.logprobs, sampling)
        if not rest or not rejected and (trial.finish == "abort" or (settings.strict and not closed)):
            return 0.0
        if settings.averaging == "arithmetic":
            return math.fsum(map(math.exp, rest)) / len(rest)
        return math.exp(math.fsum(rest) / len(rest))

    # ---- ending

    def _partial(self, marker: _Marker) -> list[int]:
        """Tokens of the text in the marker's first token that belongs to the finished step."""
        text = marker.before.decode(errors="ignore").rstrip()
        ids = self.plan.vocabulary.encode(text) if text else []
        return ids if marker.token + len(ids) <= self.plan.thinking_budget else []

    async def _exit(self, reason: ExitReason, marker: _Marker) -> tuple[ExitReason, Finish]:
        """Drop everything after the finished step, and answer."""
        partial = self._partial(marker)
        self.builder.cut(marker.token)
        self.builder.insert(partial)
        if reason is ExitReason.CONFIDENT and self.plan.settings.variant == "paper_text":
            trial = self.builder.probes[-1].token_ids
            self.builder.insert([*self.plan.inducer, *trial])
            if trial[-1] not in self.plan.vocabulary.end_ids:
                self.builder.insert(self.plan.vocabulary.end_ids[:1])
            return reason, "stop"
        return await self._finish(reason)

    async def _finish(self, reason: ExitReason) -> tuple[ExitReason, Finish]:
        """Sample the answer within the rest of the response budget, behind `closing` if the thought is open."""
        if reason is ExitReason.ABORTED:
            return reason, "abort"
        if reason is ExitReason.END_OF_TEXT:
            return reason, "stop"
        seed = self.seed
        if reason is not ExitReason.THINK_END:
            self.builder.insert(self.plan.closing)
            # The positions behind a cut were drawn once already: the answer needs another random stream.
            seed = derive_seed(self.seed, "answer")
        left = self.plan.sampling.max_tokens - len(self.builder)
        if left < 1:
            return reason, "length"
        sampling = self.plan.sampling._replace(max_tokens=left, seed=seed, offset=len(self.builder))
        answer = await self.engine.generate(self.builder.token_ids, sampling, self._request("answer"))
        self.builder.append(answer)
        return (ExitReason.ABORTED if answer.finish == "abort" else reason), answer.finish
