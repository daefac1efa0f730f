"""The scheduler: which requests wait, which run, and in which slots."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from megarl.errors import RunError
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.local.prefix_cache import PrefixCache
from megarl.rollout.local.slots import Placement, SlotTable
from megarl.types import Span

_RESERVED = 2  # steps for which a finished request's slot is kept for its continuation
_RESERVED_AT_WORD = 64  # the same after a stop word, where the continuation may wait for a probe


@dataclass(slots=True, eq=False)
class Request:
    """One `generate` call: what was asked, and the future that receives the answer."""

    token_ids: np.ndarray  # int32 [n]
    sampling: Sampling
    stops: int  # index of its stops in the StopTable
    completion: str  # the id of the completion that it is part of
    future: asyncio.Future[Generation]
    spans: list[Span] = field(default_factory=list)  # the closed ones; the open one starts where the last one ends

    def close_span(self, version: int, end: int) -> None:
        """The weights `version` sampled the tokens from the last span up to, but not including, token `end`."""
        start = self.spans[-1].end if self.spans else 0
        if end > start:
            self.spans.append(Span(version, start, end))

    def finish(self, generation: Generation) -> None:
        if not self.future.done():
            self.future.set_result(generation)

    def fail(self, error: RunError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Scheduler:
    """Two queues and the running requests. Continuations go first, while their cache is still there."""

    def __init__(self, slots: SlotTable) -> None:
        self.running: dict[int, Request] = {}  # by slot
        self._slots, self._cache = slots, PrefixCache(slots)
        self._continuations: deque[Request] = deque()
        self._fresh: deque[Request] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._continuations or self._fresh or self.running)

    def add(self, request: Request) -> None:
        (self._continuations if request.sampling.offset else self._fresh).append(request)

    def remove(self, request: Request) -> bool:
        """Take a waiting request out of its queue; False if it is in none."""
        for queue in (self._continuations, self._fresh):
            if request in queue:
                queue.remove(request)
                return True
        return False

    def clear(self) -> list[Request]:
        """Take out all requests, waiting and running, and return them."""
        requests = [*self._continuations, *self._fresh, *self.running.values()]
        for each in (self._continuations, self._fresh, self.running):
            each.clear()
        self._slots.active[:] = False
        return requests

    def admit(self) -> Iterator[tuple[Request, Placement]]:
        """Begin a step: give waiting requests a slot while there is one."""
        self._slots.reserved -= 1
        while queue := self._continuations or self._fresh:
            request, sampling = queue[0], queue[0].sampling
            ids, completion = request.token_ids, request.completion
            placement = self._cache.place(ids, sampling.max_tokens, sampling.scratch, completion)
            if placement is None:
                return
            queue.popleft()
            self._slots.enter(placement, ids, None if sampling.scratch else completion)
            self.running[placement.slot] = request
            yield request, placement

    def finish(self, slot: int, at_word: bool) -> None:
        """Make the slot of a finished request idle; `at_word`: it stopped at a stop word."""
        sampling, branch = self.running.pop(slot).sampling, self._slots.trunk_end[slot] > 0
        reserve = _RESERVED_AT_WORD if at_word and not sampling.scratch else _RESERVED
        self._slots.leave(slot, -1 if sampling.scratch and not branch else reserve)
        if sampling.forget and not branch:
            self._slots.forget(slot)

    def next_move(self) -> tuple[int, int] | None:
        """The highest active slot and an idle one below to move it to, while too many idle slots are decoded."""
        slots, width = self._slots, self._slots.width
        if 8 * (width - int(slots.active.sum())) <= width:
            return None
        free = np.flatnonzero(~slots.active[:width] & (slots.reserved[:width] < 0))
        return (width - 1, int(free[0])) if len(free) else None

    def move(self, source: int, target: int) -> None:
        """Move a running request to an idle slot."""
        self._slots.move(source, target)
        self.running[target] = self.running.pop(source)
