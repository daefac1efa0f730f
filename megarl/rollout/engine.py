"""The Engine contract: token ids in, token ids out. A new engine is one file that satisfies `Engine`."""

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

    The last `offset` of the given tokens are the response so far, with a probe's question. The token at response
    position `offset + i` is drawn from the random stream of `(seed, offset + i)`. So a continuation with the same seed
    and a larger offset draws what an uninterrupted generation would have drawn. A stop may begin in the response so
    far, but only a new token completes it.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    seed: int = 0
    offset: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    stop_words: tuple[str, ...] = ()  # stand-alone: no ASCII letter directly before or after
    stop_texts: tuple[str, ...] = ()  # anywhere in the response, also inside words
    scratch: bool = False  # not continued (a probe): an engine need not keep its cache
    # Not continued, and nothing of it stays in the local engine's cache (evaluation): a later request's prefix would be
    # cached, or not, depending on it, which rounds otherwise. Servers of others ignore it.
    forget: bool = False
    # Stop with finish "abort" once the tokens `cannot_pass`. Engines that get log-probs at the end may do so late.
    min_logprob: float | None = None
    experts: bool = False  # report the experts that each token passed through


@dataclass(slots=True)
class Generation:
    """The result of one `generate` call.

    `token_ids` are all sampled tokens, with the matched stop. After a stop word they end with the token that contains
    the next character, which confirmed that the word stands alone. `stop_start` is the index of the token in which a
    matched word, text or sequence begins. It is negative, counted back from the first sampled token, if that lies in
    the response so far. A token that completes several stops reports the first of: token id, token sequence, text or
    word (the one that begins first).
    `logprobs[i]` is log p(token_ids[i]) at `temperature` (at 1 if it is 0), before top-p and top-k.
    `experts`, if requested, int16 [tokens, layers, top_k], are those that each token of the whole sequence passed
    through. The newest token is missing: it was not an input yet.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish
    matched_stop: int | tuple[int, ...] | str | None = None
    stop_start: int | None = None
    spans: list[Span] = field(default_factory=list)
    experts: np.ndarray | None = None


def cannot_pass(logprobs: Sequence[float], sampling: Sampling) -> bool:
    """Whether the log-probs of the sampled tokens, without the first, sum to less than `min_logprob`."""
    return sampling.min_logprob is not None and math.fsum(logprobs[1:]) < sampling.min_logprob


def lineage(request_id: str) -> str:
    """The completion that a request belongs to: its id up to the last "|". All requests of one completion share a
    prefix, so a pool sends them to the engine that has it in its cache."""
    return request_id.rpartition("|")[0] or request_id


class Engine(Protocol):
    """A rollout engine. Every method may be called from one event loop, concurrently."""

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Continue `token_ids`. An aborted request returns what it has, with finish "abort"."""

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs at temperature 1 of token_ids[1:], each given the tokens before it (the canary of weight sync)."""

    async def abort(self, request_id: str) -> None:
        """End the request early. Unknown and finished ids are ignored."""

    async def update_weights(self, version: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """Replace the weights by tensors with Hugging Face's names. Tokens sampled later carry `version`.

        Returns the checksums (`weights.verify.checksum`) of the engine's tensors, by name, for those that it can read
        back. RunError names a missing, unknown or mis-shaped tensor.
        """

    async def checksums(self) -> Mapping[str, int]:
        """The checksums of the tensors that the engine has now, by name. {} if it can read back none of them."""

    async def health(self) -> None:
        """Return if the engine can serve, else raise RunError with the engine and the cause."""

    async def close(self) -> None:
        """Free the engine. End the server if megarl started it."""
