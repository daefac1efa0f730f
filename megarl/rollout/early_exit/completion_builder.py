"""A response under construction: sampled and inserted tokens, each with its origin, log-prob and weight version."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation
from megarl.types import Completion, Finish, Origin, Probe, Span


class CompletionBuilder:
    """The tokens of prompt and response in one list, as an engine gets them."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.token_ids = list(prompt)
        self.probes: list[Probe] = []
        self.discarded = 0  # sampled tokens that were cut off or given up
        self._prompt = len(self.token_ids)
        self._origin: list[Origin] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._experts: np.ndarray | None = None  # int16 [tokens, layers, top_k] of the first tokens, prompt included
        self._version = -1  # of the newest sampled token, kept or cut

    def __len__(self) -> int:
        """Response tokens."""
        return len(self._origin)

    @property
    def response(self) -> list[int]:
        return self.token_ids[self._prompt :]

    def prefix(self, length: int) -> list[int]:
        """The prompt and the first `length` response tokens."""
        return self.token_ids[: self._prompt + length]

    def append(self, generation: Generation) -> None:
        """Add what was sampled."""
        self.token_ids += generation.token_ids
        self._logprobs += generation.logprobs
        self._origin += [Origin.SAMPLED] * len(generation.token_ids)
        if generation.experts is not None:
            self._experts = generation.experts
        for span in generation.spans:
            self._version = span.version
            self._versions += [span.version] * (span.end - span.start)

    def insert(self, token_ids: Sequence[int]) -> None:
        """Add tokens that were not sampled."""
        self.token_ids += token_ids
        self._logprobs += [float("nan")] * len(token_ids)
        self._origin += [Origin.INSERTED] * len(token_ids)
        self._versions += [self._version] * len(token_ids)

    def cut(self, length: int) -> None:
        """Drop the response tokens from position `length` on."""
        self.discarded += sum(origin == Origin.SAMPLED for origin in self._origin[length:])
        del self.token_ids[self._prompt + length :]
        for values in (self._logprobs, self._origin, self._versions):
            del values[length:]
        if self._experts is not None:
            self._experts = self._experts[: self._prompt + length]

    def build(
        self, prompt_uid: str, index: int, finish: Finish, exit_reason: str, vocabulary: Vocabulary
    ) -> Completion:
        """The finished completion. Its text leaves out the end-of-text token."""
        response = self.response
        text = response[:-1] if response and response[-1] in vocabulary.end_ids else response
        return Completion(
            prompt_uid=prompt_uid,
            index=index,
            token_ids=np.array(response, np.int32),
            origin=np.array(self._origin, np.uint8),
            logprobs=np.array(self._logprobs, np.float32),
            finish=finish,
            spans=self._spans(),
            exit_reason=exit_reason,
            probes=tuple(self.probes),
            discarded_tokens=self.discarded,
            text=vocabulary.text(text),
            experts=self._inputs_experts(),
        )

    def _inputs_experts(self) -> np.ndarray | None:
        """The experts of every token but the last, as in `Completion`; None if no engine was asked."""
        if self._experts is None:
            return None
        inputs = len(self.token_ids) - 1
        known = self._experts[:inputs]
        unknown = np.full((inputs - len(known), *known.shape[1:]), -1, np.int16)
        return np.concatenate([known, unknown])

    def _spans(self) -> tuple[Span, ...]:
        """Runs of one weight version. Inserted tokens belong to the run before them."""
        edges = [i for i in range(1, len(self)) if self._versions[i] != self._versions[i - 1]]
        bounds = [0, *edges, len(self)] if len(self) else []
        return tuple(Span(self._versions[a], a, b) for a, b in zip(bounds, bounds[1:], strict=False))
