"""The types that flow through one step: Prompt → Completion → ScoredCompletion → Sample → MicroBatch → Batch.

Tokens are the truth: from sampling to training nothing is text. `Completion.text` exists for graders and viewers only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np
import torch

Finish = Literal["stop", "length", "abort"]
Verdict = Literal["right", "wrong", "timeout", "error"]


class Origin(IntEnum):
    """Where a response token comes from."""

    SAMPLED = 0  # drawn by the policy: has a behaviour log-prob
    INSERTED = 1  # written by early exit: trained on, but has no behaviour log-prob


def derive_seed(*key: object) -> int:
    """A 63-bit seed from a key such as `(seed, step, prompt uid, completion index)`; equal on every rank and layout."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. `uid` is stable across runs, epochs and machines."""

    uid: str
    token_ids: tuple[int, ...]
    text: str  # what was tokenised, after the chat template
    answer: str  # the reference answer, as the grader gets it
    source: str  # "file:line" or "file#row", for messages


@dataclass(frozen=True, slots=True)
class Span:
    """Response tokens `[start, end)` were made under weights `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Probe:
    """One early-exit probe. Its tokens never enter the completion."""

    position: int  # response tokens before the probe (the finished steps)
    token_ids: tuple[int, ...]
    confidence: float  # of a trial that was rejected early: over the tokens it had
    accepted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One response as it was rolled out. The per-token arrays have the response's length n; nothing writes to them."""

    prompt_uid: str
    index: int  # 0 … completions_per_prompt - 1
    token_ids: np.ndarray  # int32 [n]
    origin: np.ndarray  # uint8 [n], Origin
    logprobs: np.ndarray  # float32 [n], behaviour log-probs at the sampling temperature; nan where inserted
    finish: Finish
    spans: tuple[Span, ...] = ()
    exit_reason: str = "plain"  # see rollout/early_exit/plan.py; "plain" = generated without early exit
    probes: tuple[Probe, ...] = ()
    discarded_tokens: int = 0  # sampled after the step at which it exited (the marker, a continuation given up)
    text: str = ""  # decoded without the end-of-text token
    experts: np.ndarray | None = None  # int16, see Sample; None = the engine was not asked

    def __len__(self) -> int:
        """Response tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one prompt, as they were rolled out."""

    prompt: Prompt
    completions: list[Completion]


@dataclass(slots=True)
class ScoredCompletion:
    """A completion and what it is worth. Only a graded completion becomes one."""

    completion: Completion
    verdict: Verdict
    score: float  # the grader's number; 1 or 0 for a bare verdict; nan when read from a record that does not have it
    formatted: bool  # a \boxed{} is present
    steps: int  # semantic steps, algorithms/steps.py
    reward: float  # shaped; less the KL penalty, where the reward bears it
    advantage: float = math.nan  # nan until the batches are built
    weight: float = math.nan  # Horvitz-Thompson weight; 0 = not trained on; nan until the batches are built
    message: str = ""  # what went wrong in the grading


@dataclass(slots=True)
class ScoredGroup:
    """All completions of one prompt, scored. `keep`: the probability that pruning kept the prompt (1 - P_q)."""

    prompt: Prompt
    completions: list[ScoredCompletion]
    keep: float = 1.0
    replaced: bool = False  # by dynamic sampling, because its scores are equal: nothing of it is trained on


@dataclass(slots=True)
class Sample:
    """One sequence to train on: a prompt followed by a response of n tokens.

    `scale` is the whole factor of each response token's loss: weight / denominator, fixed from the unpruned batch
    (algorithms/loss.py `token_scale`). The loss of any set of samples is then a plain sum, for any packing or layout.
    """

    token_ids: np.ndarray  # int32 [prompt + n]
    response_start: int
    scale: float
    advantage: float = 0.0
    sampled: np.ndarray | None = None  # bool [n]; None = all
    rollout_logprobs: np.ndarray | None = None  # float32 [n]; nan where inserted
    old_logprobs: np.ndarray | None = None  # float32 [n]; None = the policy's own, detached (exactly on-policy)
    ref_logprobs: np.ndarray | None = None  # float32 [n]; None = no KL term
    # int16 [prompt + n - 1, layers, top_k]: the experts of every input in the rollout, for the learner to take too; -1
    # where the engine was never fed the token. None = all left to the learner's router.
    experts: np.ndarray | None = None

    @property
    def input_length(self) -> int:
        """Positions this sample occupies in a row: every token but the last is an input."""
        return len(self.token_ids) - 1


@dataclass(slots=True)
class MicroBatch:
    """One packed row: samples one after another, 1-D tensors over the row's T positions.

    Position t reads `tokens[t]` and predicts `labels[t]`. Where `scale` is 0 nothing is learned (prompt, padding).
    """

    tokens: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], restarting at 0 in every sample
    cu_seqlens: torch.Tensor  # int32 [samples + 1], boundaries including each sample's own padding
    sequence: torch.Tensor  # int64 [T], the sample's index in the row
    scale: torch.Tensor  # float32 [T]
    advantage: torch.Tensor  # float32 [T]
    sampled: torch.Tensor  # bool [T]
    rollout_logprobs: torch.Tensor  # float32 [T]; nan where there is none
    old_logprobs: torch.Tensor  # float32 [T]; nan = use the policy's own, detached
    ref_logprobs: torch.Tensor  # float32 [T]; nan = none
    sample_ids: list[int] = field(default_factory=list)  # indices into Batch.samples, to hand per-sample results back


@dataclass(slots=True)
class Batch:
    """The work of one optimizer step, with the denominators of the unpruned batch.

    `rows[r]` lists, for data-parallel rank r, the micro-batches: each a list of indices into `samples`. Every rank has
    the same number of micro-batches; an empty list is a micro-batch of padding that trains nothing.
    """

    samples: list[Sample]
    rows: list[list[list[int]]]
    total_sequences: float
    total_tokens: float
