"""The Engine contract: token ids in, token ids out. Adding an engine is one file that satisfies `Engine`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megarl.types import Finish, Span


class Sampling(NamedTuple):
    """How to sample one generation.

    The last `offset` of the given tokens are the response so far (a probe's question included). The token at response
    position `offset + i` is drawn from the random stream of `(seed, offset + i)`: continuing a completion with the same
    seed and a larger offset draws what an uninterrupted generation would have drawn. A stop may begin in the response
    so far, but is reported only when a new token completes it.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    seed: int = 0
    offset: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    stop_words: tuple[str, ...] = ()  # stand-alone words of the response: no ASCII letter directly before or after
    stop_texts: tuple[str, ...] = ()  # strings anywhere in the response, inside words too
    scratch: bool = False  # the result will not be continued (a probe): an engine need not keep its cache
    # End, with finish "abort", once `hopeless`. An engine that learns log-probs only when it is done may do so late.
    least_logprob: float | None = None
    experts: bool = False  # report the experts that every token passed through


@dataclass(slots=True)
class Generation:
    """What one `generate` call made.

    `token_ids` hold every sampled token, matched stops included: nothing is trimmed. After a stop word they end with
    the token that confirmed that the word stands alone (the one holding the character after it). `stop_start` is the
    index of the token in which a matched word, text or sequence begins; it is negative, counted back from the first
    sampled token, when it begins in the response given. A token that completes several stops reports the first of:
    token id, token sequence, text or word (the one that begins first).
    `logprobs[i]` is log p(token_ids[i]) at `temperature` (at 1 where it is 0), before top-p and top-k.
    `experts`, if asked for, int16 [tokens, layers, top_k], are those that each token of the whole sequence passed
    through, from its first on; the newest was not an input yet.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish
    matched_stop: int | tuple[int, ...] | str | None = None
    stop_start: int | None = None
    spans: list[Span] = field(default_factory=list)
    experts: np.ndarray | None = None


def hopeless(logprobs: Sequence[float], sampling: Sampling) -> bool:
    """Whether the log-probs of the tokens sampled after the first sum to less than `least_logprob`."""
    return sampling.least_logprob is not None and math.fsum(logprobs[1:]) < sampling.least_logprob


def lineage(request_id: str) -> str:
    """The completion that a request belongs to: what precedes the last "|" of its id. All requests of one completion
    share a prefix, so a pool sends them to the engine that holds it."""
    return request_id.rpartition("|")[0] or request_id


class Engine(Protocol):
    """A rollout engine. Every method may be called from one event loop, concurrently."""

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Continue `token_ids`. An aborted request returns what it has, with finish "abort"."""
        ...

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs at temperature 1 of token_ids[1:], each given what precedes it (the canary of weight sync)."""
        ...

    async def abort(self, request_id: str) -> None:
        """End the request early; unknown or finished ids are ignored."""
        ...

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """Replace the weights by Hugging Face-named tensors; tokens sampled later carry `version`.

        Returns the checksums (`weight_sync.checksum`) of the tensors that the engine now holds, by name; of those it
        can read back. Raises RunError naming missing, unknown or mis-shaped tensors.
        """
        ...

    async def health(self) -> None:
        """Return when the engine can serve; raise RunError naming the engine and the cause otherwise."""
        ...

    async def close(self) -> None:
        """Free the engine; end the server if megarl started it."""
        ...
