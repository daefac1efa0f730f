"""An engine whose tokens are chosen by a function: the whole contract but the model."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling, cannot_pass
from megarl.rollout.stops import Stops
from megarl.types import Span

Policy = Callable[[list[int], Sampling, int], tuple[int, float]]
"""(tokens so far, sampling, index of the new token in this generation) → (token, log-prob)."""


@lru_cache(maxsize=256)
def _stops(vocabulary: Vocabulary, *key: tuple) -> Stops:
    ids, sequences, words, texts = key
    sampling = Sampling(1, stop_token_ids=ids, stop_sequences=sequences, stop_words=words, stop_texts=texts)
    return Stops(sampling, vocabulary, len(vocabulary.pieces))


@dataclass
class Call:
    """One `generate` call and what it returned."""

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    generation: Generation | None = None


class ScriptedEngine:
    """Yields to the event loop before every token; `gates[prefix]` holds requests whose id begins with the prefix."""

    def __init__(self, vocabulary: Vocabulary, policy: Policy) -> None:
        self.vocabulary, self.policy = vocabulary, policy
        self.calls: list[Call] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.on_return: Callable[[Call], None] = lambda call: None
        self._aborted: set[str] = set()

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        call = Call(request_id, list(token_ids), sampling)
        self.calls.append(call)
        assert sampling.max_tokens >= 1 and sampling.offset <= len(token_ids)
        stops = _stops(self.vocabulary, *Stops.key(sampling))
        ids, first = list(token_ids), len(token_ids) - sampling.offset
        generation = call.generation = Generation([], [], "length")
        for i in range(sampling.max_tokens):
            for prefix, gate in self.gates.items():
                if request_id.startswith(prefix):
                    await gate.wait()
            await asyncio.sleep(0)
            if request_id in self._aborted:
                generation.finish = "abort"
                break
            token, logprob = self.policy(ids, sampling, i)
            ids.append(token)
            generation.token_ids.append(token)
            generation.logprobs.append(logprob)
            match, _ = stops.check(np.array(ids), first, len(ids))
            if match:
                generation.finish, generation.matched_stop = "stop", match.what
                generation.stop_start = match.start - len(token_ids)
                break
            if cannot_pass(generation.logprobs, sampling) and i + 1 < sampling.max_tokens:
                generation.finish = "abort"
                break
        if generation.token_ids:
            generation.spans = [Span(1, 0, len(generation.token_ids))]
        self.on_return(call)
        return generation

    async def score(self, token_ids):
        raise NotImplementedError("early exit does not score")

    async def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    async def update_weights(self, version, tensors):
        raise NotImplementedError("early exit does not update weights")

    async def health(self) -> None:
        pass

    async def close(self) -> None:
        pass
