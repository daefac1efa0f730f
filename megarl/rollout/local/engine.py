"""The embedded engine: continuous batching over a `Decoder`, on the CPU or on a GPU, in the caller's event loop.

While there is work a task decodes one token for every active slot (a *tick*); between ticks finished requests leave
and waiting ones enter. A tick blocks the event loop for as long as the model's forward pass takes.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megarl.errors import RunError, UserError, nearest
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling, lineage
from megarl.rollout.local.decoder import Decoder, Piece, Shape
from megarl.rollout.local.sampler import sample, uniforms
from megarl.rollout.local.slots import Slots
from megarl.rollout.stops import Match, Stops
from megarl.rollout.weights.verify import checksum
from megarl.types import Finish, Span

_PREFILL_TOKENS = 4096  # tokens of one prefill pass, padding included
_PREFILL_SCORES = 2**25  # attention scores (one layer, all heads) of one prefill pass
_RIDING = 8  # so few tokens to catch up on are fed with the others' new tokens, not in a prefill pass of their own


@dataclass(slots=True, eq=False)
class _Request:
    token_ids: np.ndarray  # int32 [n]
    sampling: Sampling
    stops: int  # index into LocalEngine._stops
    completion: str  # the request's `lineage`
    future: asyncio.Future[Generation]
    born: int = 0  # column of the first sampled token
    pending: bool = False  # a stop word awaits the next character
    spans: list[Span] = field(default_factory=list)  # closed ones; the open one began where the last ended


class LocalEngine:
    """`Engine` for small models. It has no weights until the first `update_weights`."""

    def __init__(
        self,
        model: Shape | Path,
        tokenizer: PreTrainedTokenizerBase | Vocabulary,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_slots: int = 64,
        max_length: int = 4096,
        keep_experts: bool = False,
    ) -> None:
        """`batch_slots` sequences are decoded at a time, of at most `max_length` tokens, prompt included.

        `keep_experts`: requests may ask for the experts that their tokens passed through.
        """
        shape = model if isinstance(model, Shape) else Shape.read(model)
        self.max_length = max_length
        self.version = -1
        self._vocabulary = tokenizer if isinstance(tokenizer, Vocabulary) else Vocabulary(tokenizer)
        self._device = torch.device(device)
        # The last slot is for score().
        self._decoder = Decoder(shape, self._device, dtype, batch_slots + 1, max_length, keep_experts)
        self._keeps_experts = keep_experts and shape.experts is not None
        self._slots = Slots(batch_slots, max_length)
        self._stops: dict[tuple, int] = {}
        self._stop_table: list[Stops] = []
        self._touches = np.zeros((0, shape.vocabulary), bool)
        self._requests: list[_Request | None] = [None] * batch_slots
        self._ids: dict[str, _Request] = {}
        self._returning: deque[_Request] = deque()  # continue a response: they go first, while their cache is there
        self._fresh: deque[_Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._failure: str | None = "has no weights yet"
        # What the tick reads of each slot's request.
        self._limit = np.zeros(batch_slots, np.int64)  # column at which max_tokens is reached
        self._seed = np.zeros(batch_slots, np.uint64)
        self._shift = np.zeros(batch_slots, np.int64)  # response position of a sampled token = its column + shift
        self._stop = np.zeros(batch_slots, np.int64)
        self._pending = np.zeros(batch_slots, bool)
        self._least = np.full(batch_slots, -np.inf)  # `Sampling.least_logprob`
        self._logprob = np.zeros(batch_slots)  # sum over the sampled tokens after the first; inf before the first
        self._sampling = np.zeros((3, batch_slots), np.float32)  # temperature, top-p, top-k
        self._sampling_on_device: tuple[torch.Tensor, ...] | None = None

    # ---- the contract

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        self._check_serving()
        if not len(token_ids):
            raise UserError("engine: a request needs at least one token to continue")
        if sampling.max_tokens < 1:
            raise UserError(f"max_tokens: {sampling.max_tokens} leaves nothing to generate; at least 1")
        if len(token_ids) + sampling.max_tokens > self.max_length:
            raise UserError(
                f"max_length: {len(token_ids)} tokens and {sampling.max_tokens} new ones exceed the local engine's "
                f"{self.max_length}; at least {len(token_ids) + sampling.max_tokens}"
            )
        if sampling.experts and not self._keeps_experts:
            raise UserError("experts: this engine keeps none; it needs keep_experts and a mixture of experts")
        if request_id in self._ids:
            raise RunError(f"local engine: request {request_id!r} is already running")
        ids, completion = np.asarray(token_ids, np.int32), lineage(request_id)
        request = _Request(ids, sampling, self._stops_index(sampling), completion, asyncio.Future())
        self._ids[request_id] = request
        (self._returning if sampling.offset else self._fresh).append(request)
        if self._task is None:
            self._task = asyncio.ensure_future(self._run())
        try:
            return await request.future
        except asyncio.CancelledError:
            self._end(request)
            raise
        finally:
            del self._ids[request_id]

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check_serving()
        if len(token_ids) > self.max_length:
            raise UserError(f"max_length: cannot score {len(token_ids)} tokens; the local engine has {self.max_length}")
        ids = torch.tensor(token_ids, device=self._device)[None]
        logprobs: list[float] = []
        for start, hidden in self._feed([self._slots.count], [np.asarray(token_ids[:-1])], [0]):
            targets = ids[0, start + 1 : start + 1 + hidden.shape[1]]
            logits = self._decoder.logits(hidden[0, : len(targets)])
            logprobs += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return logprobs

    async def abort(self, request_id: str) -> None:
        if request := self._ids.get(request_id):
            self._end(request)

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """In place, between two ticks. Generations under way go on under the new weights in a new span, their prefix
        computed anew; what idle slots held is forgotten."""
        self._failure = "was left with part of the weights by an update that failed"
        weights = self._decoder.weights()
        missing = dict.fromkeys(weights)
        sums: dict[str, int] = {}
        with torch.no_grad():
            for name, tensor in tensors:
                if name == "lm_head.weight" and name not in weights:
                    continue  # tied: it is the embedding
                if name not in weights:
                    raise RunError(f"local engine: no tensor {name!r} in this model{nearest(name, weights)}")
                if tensor.shape != weights[name].shape:
                    raise RunError(
                        f"local engine: {name} has shape {tuple(tensor.shape)}, not {tuple(weights[name].shape)}"
                    )
                weights[name].copy_(tensor)
                sums[name] = checksum(weights[name])
                missing.pop(name, None)
            if missing:
                raise RunError(f"local engine: {len(missing)} tensors did not arrive, among them {next(iter(missing))}")
            self._decoder.refresh()
        self._renew(version)
        self._failure = None
        return sums

    async def health(self) -> None:
        self._check_serving()

    async def close(self) -> None:
        self._fail(RunError("local engine: closed"))
        if self._task:
            self._task.cancel()

    # ---- the task

    async def _run(self) -> None:
        try:
            await asyncio.sleep(0)  # let the other coroutines make their first requests
            while self._returning or self._fresh or self._slots.active.any():
                finished = self._tick()
                # After a finish: its future wakes a coroutine, which may start a task, which makes the next request.
                for _ in range(3 if finished else 1):
                    await asyncio.sleep(0)
        except Exception as error:
            self._fail(error)
        except BaseException as error:  # a task keeps it to itself: who waits here would wait for ever
            if self._failure is None:
                self._fail(RunError(f"local engine: ended by {type(error).__name__}"))
            raise
        finally:
            self._task = None

    def _tick(self) -> bool:
        """Enter waiting requests and decode one token for each active slot; true if a request finished."""
        slots = self._slots
        slots.tick += 1
        self._admit()
        if not slots.active.any():
            return False
        self._compact()
        n = int(np.flatnonzero(slots.active)[-1]) + 1
        active, end = slots.active[:n], slots.end[:n]
        columns = np.where(active, end - 1, self._decoder.cache.spare)
        newest = slots.tokens[np.arange(n), np.minimum(columns, slots.columns - 1)].astype(np.int64)
        logits = self._decoder.decode(
            self._upload(newest),
            self._upload(columns),
            int(end[active].max()),
            self._gaps(slots.gaps(slice(n))),
            self._late(np.flatnonzero(active & (slots.fed[:n] < end - 1))),
        )
        uniform = self._upload(uniforms(self._seed[:n], (end + self._shift[:n]).clip(0)))
        tokens, logprobs = (x.cpu().numpy() for x in sample(logits, uniform, *self._sampling_tensors(n)))
        rows = np.flatnonzero(active)
        tokens = tokens[rows]
        before = self._logprob[rows]
        self._logprob[rows] = np.where(np.isinf(before), 0.0, before + logprobs[rows])
        slots.fed[rows] = end[rows]
        slots.tokens[rows, end[rows]] = tokens
        slots.logprobs[rows, end[rows]] = logprobs[rows]
        slots.end[rows] += 1
        touched = self._touches[self._stop[rows], tokens] | self._pending[rows]
        full = slots.end[rows] >= self._limit[rows]
        finished = False
        hopeless = self._logprob[rows] < self._least[rows]
        for row in rows[touched | full | hopeless]:
            finished |= self._review(int(row))
        return finished

    def _review(self, slot: int) -> bool:
        """Check a slot's newest token for a stop or the limit; finish its request if so."""
        slots, request = self._slots, self._requests[slot]
        assert request is not None
        end = int(slots.end[slot])
        first = max(request.born - request.sampling.offset, int(slots.trunk_end[slot]))
        match, self._pending[slot] = self._stop_table[request.stops].check(slots.tokens[slot], first, end)
        if match is not None:
            self._finish(slot, "stop", match)
        elif end >= self._limit[slot]:
            self._finish(slot, "length")
        elif self._logprob[slot] < self._least[slot]:
            self._finish(slot, "abort")
        else:
            return False
        return True

    def _finish(self, slot: int, finish: Finish, match: Match | None = None) -> None:
        slots, request = self._slots, self._requests[slot]
        assert request is not None
        born, end = request.born, int(slots.end[slot])
        generation = Generation(
            token_ids=slots.tokens[slot, born:end].tolist(),
            logprobs=slots.logprobs[slot, born:end].tolist(),
            finish=finish,
            matched_stop=match.what if match else None,
            stop_start=match.start - born if match else None,
            spans=self._spans(request, end),
            experts=self._experts(slot) if request.sampling.experts else None,
        )
        if not math.isfinite(sum(generation.logprobs)):
            raise RunError("local engine: the model's logits are not finite")
        self._requests[slot] = None
        at_word = match is not None and match.what in request.sampling.stop_words
        slots.stop(slot, at_word, request.sampling.scratch)
        if not request.future.done():
            request.future.set_result(generation)

    def _end(self, request: _Request) -> None:
        """Abort: whether it is waiting, being decoded or just finished."""
        for queue in (self._returning, self._fresh):
            if request in queue:
                queue.remove(request)
                if not request.future.done():
                    request.future.set_result(Generation([], [], "abort"))
                return
        if request in self._requests:
            self._finish(self._requests.index(request), "abort")

    def _spans(self, request: _Request, end: int) -> list[Span]:
        start = request.spans[-1].end if request.spans else 0
        count = end - request.born
        return [*request.spans, Span(self.version, start, count)] if count > start else list(request.spans)

    def _experts(self, slot: int) -> np.ndarray:
        """Those that the sequence's tokens passed through, as far as they were fed; see `Generation`."""
        slots = self._slots
        gap, fed = int(slots.gap[slot]), int(slots.fed[slot])
        trunk = int(slots.trunk_end[slot]) - gap  # of a branch, the tokens before it forks
        kept = self._decoder.cache.experts[slot]
        return (torch.cat([kept[:trunk], kept[trunk + gap : fed]]) if gap else kept[:fed]).cpu().numpy().copy()

    # ---- entering the batch

    def _admit(self) -> None:
        """Give waiting requests a slot, and fill its cache with all but the last of their tokens."""
        slots = self._slots
        leaders: dict[bytes, int] = {}  # prompts that are prefilled in this tick → slot
        followers: list[tuple[int, int]] = []
        entered: list[int] = []
        while self._returning or self._fresh:
            queue = self._returning or self._fresh
            request = queue[0]
            ids, scratch = request.token_ids, request.sampling.scratch
            placement = slots.place(ids, request.sampling.max_tokens, scratch, request.completion)
            if placement is None:
                break
            queue.popleft()
            slot = placement.slot
            if placement.source != slot:
                self._decoder.cache.copy(placement.source, slot, placement.shared)
            slots.start(placement, ids, scratch, request.completion)
            self._enter(slot, request)
            if placement.shared == len(ids) - 1:
                continue
            leader = slot if scratch else leaders.setdefault(ids.tobytes(), slot)
            if leader == slot:
                entered.append(slot)
            else:
                followers.append((leader, slot))
        behind = [s for s in entered if slots.end[s] - slots.fed[s] > 1 + _RIDING]
        if behind:
            starts = [int(slots.fed[s]) for s in behind]
            pieces = [slots.tokens[s, slots.fed[s] : slots.end[s] - 1] for s in behind]
            for _ in self._feed(behind, pieces, starts, slots.gaps(behind)):
                pass
            slots.fed[behind] = slots.end[behind] - 1
        for leader, slot in followers:
            done = int(slots.fed[leader])
            self._decoder.cache.copy(leader, slot, done)
            slots.fed[slot] = done

    def _enter(self, slot: int, request: _Request) -> None:
        sampling = request.sampling
        self._requests[slot] = request
        request.born = int(self._slots.end[slot])
        self._limit[slot] = request.born + sampling.max_tokens
        self._seed[slot] = sampling.seed
        self._shift[slot] = sampling.offset - request.born
        self._stop[slot] = request.stops
        # A hair less: a running sum is not the exact one, and who is told "abort" looks whether it was `hopeless`.
        self._least[slot] = -np.inf if sampling.least_logprob is None else sampling.least_logprob - 1e-9
        self._logprob[slot] = np.inf
        self._sampling[:, slot] = sampling.temperature, sampling.top_p, sampling.top_k
        self._sampling_on_device = None
        stops = self._stop_table[request.stops]
        self._pending[slot] = bool(sampling.offset) and stops.awaits(
            request.token_ids, len(request.token_ids) - sampling.offset, len(request.token_ids)
        )

    def _compact(self) -> None:
        """Move sequences from the highest slots into those left below, so that few idle slots are decoded."""
        slots = self._slots
        while True:
            active = np.flatnonzero(slots.active)
            n = int(active[-1]) + 1
            if 8 * (n - len(active)) <= n:
                return
            left = np.flatnonzero(~slots.active[:n] & (slots.awaited[:n] < slots.tick))
            if not len(left):
                return
            source, target = n - 1, int(left[0])
            self._decoder.cache.copy(source, target, int(slots.fed[source]))
            slots.move(source, target)
            for array in (self._limit, self._seed, self._shift, self._stop, self._pending, self._least, self._logprob):
                array[target] = array[source]
            self._sampling[:, target] = self._sampling[:, source]
            self._requests[target], self._requests[source] = self._requests[source], None
            self._sampling_on_device = None

    def _feed(
        self,
        slots: Sequence[int],
        pieces: Sequence[np.ndarray],
        starts: Sequence[int],
        gaps: np.ndarray | None = None,
    ) -> Iterable[tuple[int, torch.Tensor]]:
        """Prefill: feed each slot's piece of tokens from its start column on, many slots and tokens a pass. `gaps` are
        `Slots.gaps`.

        Yields (tokens of the pieces fed before this pass, hidden states [R, T, h]).
        """
        heads = self._decoder.shape.heads
        order = sorted(range(len(slots)), key=lambda i: len(pieces[i]))
        while order:
            longest = len(pieces[order[-1]])
            rows = max(1, min(len(order), _PREFILL_TOKENS // max(longest, 1)))
            chosen, order = order[-rows:], order[:-rows]
            done = 0
            while done < longest:
                width = max(starts[i] for i in chosen) + longest
                step = min(
                    longest - done, max(1, min(_PREFILL_TOKENS // rows, _PREFILL_SCORES // (rows * heads * width)))
                )
                parts = [pieces[i][done : done + step] for i in chosen]
                begin = [starts[i] + done for i in chosen]
                hidden = None if gaps is None else gaps[chosen]
                piece = self._piece(parts, [slots[i] for i in chosen], begin, hidden)
                yield done, self._decoder.extend(piece)
                done += step

    def _late(self, late: np.ndarray) -> Piece | None:
        """What these slots have yet to be fed before their newest token."""
        slots = self._slots
        if not len(late):
            return None
        parts = [slots.tokens[s, slots.fed[s] : slots.end[s] - 1] for s in late]
        return self._piece(parts, late, slots.fed[late], slots.gaps(late))

    def _piece(
        self,
        parts: Sequence[np.ndarray],
        slots: Sequence[int] | np.ndarray,
        starts: Sequence[int] | np.ndarray,
        gaps: np.ndarray | None,
    ) -> Piece:
        """Token ids, and of each part the slot, the column of its first token, and the gap."""
        counts = np.array([len(part) for part in parts])
        tokens = np.zeros((len(parts), counts.max()), np.int64)
        for row, part in zip(tokens, parts, strict=True):
            row[: len(part)] = part
        in_a_row = np.array_equal(slots, np.arange(slots[0], slots[0] + len(parts)))
        return Piece(
            self._upload(tokens),
            self._upload(np.asarray(slots)),
            self._upload(np.asarray(starts)),
            self._upload(counts),
            self._gaps(gaps),
            int(slots[0]) if in_a_row else None,
        )

    def _renew(self, version: int) -> None:
        """After a weight update: close the spans of running requests and compute their caches anew."""
        slots = self._slots
        for slot, request in enumerate(self._requests):
            if request is None:
                slots.forget(slot)
                continue
            moved = slots.straighten(slot)
            request.born -= moved
            self._limit[slot] -= moved
            self._shift[slot] += moved
            request.spans = self._spans(request, int(slots.end[slot]))
        running = [slot for slot, request in enumerate(self._requests) if request]
        pieces = [slots.tokens[s, : slots.fed[s]] for s in running]
        for _ in self._feed(running, pieces, [0] * len(running)):
            pass
        self.version = version

    # ---- small things

    def _stops_index(self, sampling: Sampling) -> int:
        key = Stops.key(sampling)
        if key not in self._stops:
            stops = Stops(sampling, self._vocabulary, self._touches.shape[1])
            self._stops[key] = len(self._stop_table)
            self._stop_table.append(stops)
            self._touches = np.concatenate([self._touches, stops.touches[None]])
        return self._stops[key]

    def _sampling_tensors(self, n: int) -> tuple[torch.Tensor, ...]:
        """Temperature [n] and, if any active request truncates, top-p and top-k [n]."""
        if self._sampling_on_device is None or len(self._sampling_on_device[0]) != n:
            active = self._slots.active[:n]
            temperature, top_p, top_k = self._sampling[:, :n]
            tensors = [self._upload(temperature.copy())]
            if ((top_p < 1) & active).any() or ((top_k > 0) & active).any():
                tensors += [self._upload(top_p.copy()), self._upload(top_k.astype(np.int64))]
            self._sampling_on_device = tuple(tensors)
        return self._sampling_on_device

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    def _gaps(self, gaps: np.ndarray | None) -> torch.Tensor | None:
        return None if gaps is None else self._upload(gaps)

    def _check_serving(self) -> None:
        if self._failure:
            raise RunError(f"local engine: {self._failure}")

    def _fail(self, error: Exception) -> None:
        """End every request with the error; the engine serves no more."""
        self._failure = str(error).removeprefix("local engine: ")
        waiting = [*self._returning, *self._fresh, *(r for r in self._requests if r)]
        self._returning.clear()
        self._fresh.clear()
        self._requests = [None] * self._slots.count
        self._slots.active[:] = False
        for request in waiting:
            if not request.future.done():
                failure = RunError(f"local engine: {self._failure}")
                failure.__cause__ = error
                request.future.set_exception(failure)
