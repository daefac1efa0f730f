"""The stop table: when each slot's request ends."""

from __future__ import annotations

from collections.abc import Callable, Container

import numpy as np

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Sampling
from megarl.rollout.local.scheduler import Request
from megarl.rollout.local.slots import SlotTable
from megarl.rollout.stops import Match, Stops
from megarl.types import Finish

_MAX_KINDS = 256  # of stops that are kept: each takes a byte per token of the vocabulary


class StopTable:
    """Stops and limits of every slot's request. Array operations pick the few slots that `check` must look at."""

    def __init__(self, slots: SlotTable, vocabulary: Vocabulary, vocabulary_size: int) -> None:
        self._slots, self._vocabulary = slots, vocabulary
        self._indices: dict[tuple, int] = {}  # oldest first
        self._stops: list[Stops] = []
        self._candidates = np.zeros((0, vocabulary_size), bool)  # `Stops.stop_candidates` of each
        self._index = np.zeros(slots.count, np.int64)  # into `_stops`, by slot; as all that follow
        self._pending = np.zeros(slots.count, bool)  # a stop word awaits the next character
        self._max_tokens = np.zeros(slots.count, np.int64)
        self._min_logprob = np.zeros(slots.count)
        self._logprob = np.zeros(slots.count)  # sum over the sampled tokens after the first; inf before the first

    def index(self, sampling: Sampling, in_use: Callable[[], Container[int]] = tuple) -> int:
        """Index of the request's stops, for `Request.stops`. Of `_MAX_KINDS`, the oldest that is not `in_use` goes."""
        key = Stops.key(sampling)
        if key not in self._indices:
            stops = Stops(sampling, self._vocabulary, self._candidates.shape[1])
            self._indices[key] = index = self._free_index(in_use)
            self._candidates[index], self._stops[index] = stops.stop_candidates, stops
        return self._indices[key]

    def _free_index(self, in_use: Callable[[], Container[int]]) -> int:
        if len(self._stops) >= _MAX_KINDS:
            kept = in_use()
            for key, index in self._indices.items():
                if index not in kept:
                    del self._indices[key]
                    return index
        width = self._candidates.shape[1]
        self._candidates = np.concatenate([self._candidates, np.zeros((1, width), bool)])
        self._stops.append(None)  # type: ignore[arg-type]
        return len(self._stops) - 1

    def enter(self, slot: int, request: Request) -> None:
        """Watch for the end of the slot's new request."""
        sampling, n = request.sampling, len(request.token_ids)
        self._index[slot], self._max_tokens[slot] = request.stops, sampling.max_tokens
        # A hair less, as a running sum differs from the exact one: after an "abort", the caller checks `cannot_pass`.
        self._min_logprob[slot] = -np.inf if sampling.min_logprob is None else sampling.min_logprob - 1e-9
        self._logprob[slot] = np.inf
        awaits = self._stops[request.stops].awaits
        self._pending[slot] = bool(sampling.offset) and awaits(request.token_ids, n - sampling.offset, n)

    def move(self, source: int, target: int) -> None:
        for array in (self._index, self._pending, self._max_tokens, self._min_logprob, self._logprob):
            array[target] = array[source]

    def candidates(self, slots: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Those of `slots` whose request may end with its newest token, given with its log-prob for each slot."""
        before = self._logprob[slots]
        self._logprob[slots] = total = np.where(np.isinf(before), 0.0, before + logprobs)
        stopped = self._candidates[self._index[slots], tokens] | self._pending[slots]
        full = self._slots.end[slots] - self._slots.start[slots] >= self._max_tokens[slots]
        return slots[stopped | full | (total < self._min_logprob[slots])]

    def check(self, slot: int, request: Request) -> tuple[Finish, Match | None] | None:
        """Whether a candidate's request ends with its newest token, and by which stop."""
        table = self._slots
        start, end = int(table.start[slot]), int(table.end[slot])
        first = max(start - request.sampling.offset, int(table.trunk_end[slot]))
        match, self._pending[slot] = self._stops[request.stops].check(table.tokens[slot], first, end)
        if match is not None:
            return "stop", match
        if end - start >= self._max_tokens[slot]:
            return "length", None
        return ("abort", None) if self._logprob[slot] < self._min_logprob[slot] else None
