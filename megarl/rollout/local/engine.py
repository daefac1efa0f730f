"""The embedded engine: continuous batching over a `Decoder`, on the CPU or on a GPU, in the caller's event loop.

A task runs while there is work. Each *step* admits waiting requests into slots, decodes one token for every active
slot, and ends the requests that are done. A step blocks the event loop for as long as the model's forward pass takes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megarl.errors import RunError, UserError
from megarl.models.config_json import read_shape
from megarl.models.shape import ModelShape
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling, lineage
from megarl.rollout.local.decoder import Decoder
from megarl.rollout.local.kv_cache import check_room
from megarl.rollout.local.runner import ModelRunner
from megarl.rollout.local.sampler import Sampler
from megarl.rollout.local.scheduler import Request, Scheduler
from megarl.rollout.local.slots import SlotTable
from megarl.rollout.local.stop_table import StopTable
from megarl.rollout.stops import Match
from megarl.types import Finish


class LocalEngine:
    """`Engine` for small models. It has no weights until the first `update_weights`."""

    def __init__(
        self,
        model: ModelShape | Path,
        tokenizer: PreTrainedTokenizerBase | Vocabulary,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_slots: int = 64,
        max_length: int = 4096,
        keep_experts: bool = False,
    ) -> None:
        """Decodes up to `batch_slots` sequences at a time, of at most `max_length` tokens with the prompt.

        `keep_experts`: requests may ask for the experts that their tokens passed through. Raises UserError if weights
        and cache do not fit into the free memory of a CUDA device.
        """
        shape = model if isinstance(model, ModelShape) else read_shape(model)
        vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)
        check_room(shape, batch_slots, max_length, torch.device(device), dtype, keep_experts)
        decoder = Decoder(shape, torch.device(device), dtype, batch_slots + 1, max_length, keep_experts)
        self.max_length = max_length
        self._vocabulary_size = shape.vocab
        self.version = -1
        self._slots = SlotTable(batch_slots, max_length)
        self._scheduler = Scheduler(self._slots)
        self._runner = ModelRunner(decoder, self._slots)
        self._sampler = Sampler(batch_slots, decoder.device)
        self._stops = StopTable(self._slots, vocabulary, shape.vocab)
        self._requests: dict[str, Request] = {}  # by id
        self._task: asyncio.Task[None] | None = None
        self._failure: str | None = "has no weights yet"

    # ---- the contract

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        await self.health()
        self._check(token_ids, sampling)
        if request_id in self._requests:
            raise RunError(f"local engine: request {request_id!r} is already running")
        ids = np.asarray(token_ids, np.int32)
        stops = self._stops.index(sampling, lambda: {request.stops for request in self._requests.values()})
        request = Request(ids, sampling, stops, lineage(request_id), asyncio.Future())
        self._requests[request_id] = request
        self._scheduler.add(request)
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())
        try:
            return await request.future
        except asyncio.CancelledError:
            self._abort(request)
            raise
        finally:
            del self._requests[request_id]

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        await self.health()
        self._check_ids("token_ids", token_ids)
        if len(token_ids) > self.max_length:
            raise UserError(f"max_length: cannot score {len(token_ids)} tokens; the local engine has {self.max_length}")
        return self._runner.score(token_ids)

    def _check(self, token_ids: Sequence[int], sampling: Sampling) -> None:
        """UserError for what would fail in a step, and there take every other request with it."""
        self._check_ids("token_ids", token_ids)
        if sampling.max_tokens < 1:
            raise UserError(f"max_tokens: {sampling.max_tokens} leaves nothing to generate; at least 1")
        if len(token_ids) + sampling.max_tokens > self.max_length:
            raise UserError(
                f"max_length: {len(token_ids)} tokens and {sampling.max_tokens} new ones exceed the local engine's "
                f"{self.max_length}; at least {len(token_ids) + sampling.max_tokens}"
            )
        if not 0 <= sampling.offset <= len(token_ids):
            raise UserError(f"offset: {sampling.offset} of {len(token_ids)} tokens; at most {len(token_ids)}")
        if sampling.stop_token_ids:
            self._check_ids("stop_token_ids", sampling.stop_token_ids)
        for sequence in sampling.stop_sequences:
            self._check_ids("stop_sequences", sequence)
        if sampling.experts and not self._runner.keeps_experts:
            raise UserError("experts: this engine keeps none; it needs keep_experts and a mixture of experts")

    def _check_ids(self, what: str, ids: Sequence[int]) -> None:
        if not len(ids):
            raise UserError(f"{what}: the engine needs at least one token")
        low, high = int(np.min(ids)), int(np.max(ids))
        if low < 0 or high >= self._vocabulary_size:
            wrong = low if low < 0 else high
            raise UserError(f"{what}: {wrong} is no token; the model's are 0 to {self._vocabulary_size - 1}")

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """RunError if `update_weights` would refuse tensors of these names and shapes. Changes nothing."""
        self._runner.check(shapes)

    async def abort(self, request_id: str) -> None:
        if request := self._requests.get(request_id):
            self._abort(request)

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """In place, between two steps. Running requests continue under the new weights in a new span, with their prefix
        recomputed. The cached prefixes of idle slots are dropped."""
        self._failure = "was left with part of the weights by an update that failed"
        sums = self._runner.load(tensors)
        running = sorted(self._scheduler.running)
        for slot in running:
            self._slots.detach_branch(slot)
            self._scheduler.running[slot].close_span(self.version, int(self._slots.end[slot] - self._slots.start[slot]))
        self._slots.forget(~self._slots.active)
        self._slots.fed[running] = 0
        self._runner.prefill(running, piggyback=False)
        self.version = version
        self._failure = None
        return sums

    async def checksums(self) -> Mapping[str, int]:
        return self._runner.checksums()

    async def health(self) -> None:
        if self._failure:
            raise RunError(f"local engine: {self._failure}")

    async def close(self) -> None:
        self._fail(RunError("local engine: closed"))
        if self._task:
            self._task.cancel()

    # ---- the task

    async def _run(self) -> None:
        try:
            await asyncio.sleep(0)  # let the other coroutines make their first requests
            while self._scheduler.has_work:
                finished = self.step()
                # After a finish: its future wakes a coroutine, which may start a task, which makes the next request.
                for _ in range(3 if finished else 1):
                    await asyncio.sleep(0)
        except Exception as error:
            self._fail(error)
        except BaseException as error:  # only the task would get it: whoever awaits a request would wait for ever
            if self._failure is None:
                self._fail(RunError(f"local engine: ended by {type(error).__name__}"))
            raise
        finally:
            self._task = None

    def step(self) -> bool:
        """Admit waiting requests and decode one token for each running one; true if a request finished."""
        self._admit()
        slots = self._slots
        if not slots.active.any():
            return False
        while move := self._scheduler.next_move():
            self._move(*move)
        logits = self._runner.decode()
        n = len(logits)
        tokens, logprobs = self._sampler.draw(logits, slots.end[:n] - slots.start[:n], slots.active[:n])
        active = np.flatnonzero(slots.active)
        slots.append(active, tokens[active], logprobs[active])
        finished = False
        for slot in self._stops.candidates(active, tokens[active], logprobs[active]).tolist():
            if end := self._stops.check(slot, self._scheduler.running[slot]):
                self._finish(slot, *end)
                finished = True
        return finished

    def _admit(self) -> None:
        """Put waiting requests into slots and prefill all but their newest token. Equal prompts are prefilled once."""
        leaders: dict[bytes, int] = {}  # prompt → the slot that it is prefilled in
        followers: list[tuple[int, int]] = []
        entered: list[int] = []
        for request, placement in self._scheduler.admit():
            slot, shared, ids = placement.slot, placement.shared, request.token_ids
            if placement.source != slot:
                self._runner.copy(placement.source, slot, shared)
            self._sampler.enter(slot, request.sampling)
            self._stops.enter(slot, request)
            if shared == len(ids) - 1:
                continue
            leader = slot if request.sampling.scratch else leaders.setdefault(ids.tobytes(), slot)
            if leader == slot:
                entered.append(slot)
            else:
                followers.append((leader, slot))
        self._runner.prefill(entered)
        for leader, slot in followers:
            self._slots.fed[slot] = self._slots.fed[leader]
            self._runner.copy(leader, slot, int(self._slots.fed[leader]))

    def _move(self, source: int, target: int) -> None:
        """Move a running request to an idle slot."""
        self._runner.copy(source, target, int(self._slots.fed[source]))
        for part in (self._scheduler, self._sampler, self._stops):
            part.move(source, target)

    def _finish(self, slot: int, finish: Finish, match: Match | None = None) -> None:
        """End a running request with the tokens that it has."""
        slots, request = self._slots, self._scheduler.running[slot]
        start, end = int(slots.start[slot]), int(slots.end[slot])
        request.close_span(self.version, end - start)
        generation = Generation(
            token_ids=slots.tokens[slot, start:end].tolist(),
            logprobs=slots.logprobs[slot, start:end].tolist(),
            finish=finish,
            matched_stop=match.what if match else None,
            stop_start=match.start - start if match else None,
            spans=request.spans,
            experts=self._runner.experts(slot) if request.sampling.experts else None,
        )
        self._scheduler.finish(slot, match is not None and match.what in request.sampling.stop_words)
        if math.isfinite(sum(generation.logprobs)):
            request.finish(generation)
        else:  # of this request: the others may be right
            slots.forget(slot)
            request.fail(RunError("local engine: the model's logits are not finite"))

    def _abort(self, request: Request) -> None:
        """End a request that waits or runs."""
        if self._scheduler.remove(request):
            request.finish(Generation([], [], "abort"))
        for slot, running in list(self._scheduler.running.items()):
            if running is request:
                self._finish(slot, "abort")

    def _fail(self, error: Exception) -> None:
        """End every request with the error. The engine serves no more."""
        self._failure = str(error).removeprefix("local engine: ")
        for request in self._scheduler.clear():
            failure = RunError(f"local engine: {self._failure}")
            failure.__cause__ = error
            request.fail(failure)
