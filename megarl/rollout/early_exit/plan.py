"""Early exit's settings in tokens, and which of them cannot work with a tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.errors import UserError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling


class ExitReason(StrEnum):
    """Why a thought ended."""

    PLAIN = "plain"  # generated without early exit
    THINK_END = "think_end"  # the policy closed it
    END_OF_TEXT = "end_of_text"  # the policy ended the response inside it
    CONFIDENT = "confident"  # a probe's confidence passed the threshold
    NEAR_BUDGET = "near_budget"  # a marker came shortly before the end of the thinking budget
    REPETITION = "repetition"  # steps kept repeating the words of the step before
    BUDGET = "budget"  # the thinking budget was used up
    ABORTED = "aborted"  # the engine was told to stop


@dataclass(frozen=True, slots=True)
class Plan:
    """Early exit's settings in tokens, equal for all completions of a run."""

    settings: config.EarlyExit
    vocabulary: Vocabulary
    sampling: Sampling  # of the response; max_tokens is the response budget
    inducer: tuple[int, ...]
    closing: tuple[int, ...]
    thought_stops: Sampling  # `sampling` with the stops of a thought: end of text, `think_end`; markers are added

    @classmethod
    def of(cls, rollout: config.Rollout, vocabulary: Vocabulary) -> Plan:
        exits = rollout.early_exit
        sampling = Sampling(
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            stop_token_ids=vocabulary.end_ids,
            experts=rollout.replay_routing,
        )
        think_end = vocabulary.encode(exits.think_end)
        # The policy may cut several tokens differently (">" and a line end in one token): match their text.
        if len(think_end) == 1:
            stops = sampling._replace(stop_token_ids=(*vocabulary.end_ids, *think_end))
        else:
            stops = sampling._replace(stop_texts=(exits.think_end,))
        inducer, closing = vocabulary.encode(exits.trial_inducer), vocabulary.encode(exits.closing)
        return cls(exits, vocabulary, sampling, tuple(inducer), tuple(closing), stops)

    @property
    def thinking_budget(self) -> int:
        """Response tokens that the thought may use."""
        return math.floor(self.settings.thinking_share * self.sampling.max_tokens)

    @property
    def min_logprob(self) -> float | None:
        """The least sum of a trial's log-probs, without the first, that can still pass the threshold.

        The rest helps most when it is as long as allowed and every token has probability 1. 1e-6 is for rounding.
        """
        exits = self.settings
        if not exits.reject_early or exits.averaging != "geometric":
            return None
        return (exits.probe_tokens - 1) * math.log(exits.threshold) - 1e-6

    def closes(self, generation: Generation) -> bool:
        """Whether the generation stopped at `think_end`."""
        stop = generation.matched_stop
        if isinstance(stop, str):
            return stop == self.settings.think_end
        return stop in self.thought_stops.stop_token_ids and stop not in self.vocabulary.end_ids

    def ends(self, generation: Generation) -> bool:
        """Whether the generation stopped at the end of the text."""
        return generation.matched_stop in self.vocabulary.end_ids


def check(rollout: config.Rollout, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse settings of early exit that cannot work with this tokenizer. Raises UserError."""
    exits = rollout.early_exit
    if not exits.enabled:
        return
    vocabulary = Vocabulary(tokenizer)
    texts = [("markers", marker) for marker in exits.markers]
    texts += [("think_end", exits.think_end), ("inducer", exits.trial_inducer), ("closing", exits.closing)]
    for name, text in texts:
        ids = vocabulary.encode(text)
        made = vocabulary.bytes_of(ids).decode(errors="replace")
        if not text.strip() or tokenizer.unk_token_id in ids or _squeeze(made) != _squeeze(text):
            known = "; it has no text" if not text.strip() else f": it becomes {made!r}"
            raise UserError(f"rollout.early_exit.{name}: the tokenizer cannot encode {text!r}{known}")
    plan = Plan.of(rollout, vocabulary)
    room = plan.sampling.max_tokens - plan.thinking_budget
    trial = len(plan.inducer) + exits.probe_tokens if exits.variant == "paper_text" else 0
    needed = max(len(plan.closing), trial) + 1
    if rollout.max_response_tokens <= needed:
        raise UserError(
            f"rollout.max_response_tokens: {rollout.max_response_tokens} leaves no room for a thought before "
            f"the closing and an answer, which need {needed}; at least {needed + 1}"
        )
    if room < needed or plan.thinking_budget < 1:
        share = math.floor((1 - needed / rollout.max_response_tokens) * 1000) / 1000
        raise UserError(
            f"rollout.early_exit.thinking_share: {exits.thinking_share} of {rollout.max_response_tokens} tokens leaves "
            f"{room} for the closing and an answer, which need {needed}; at most {share:g}"
        )


def _squeeze(text: str) -> str:
    """Without blanks: tokenizers of whole words add blanks between them."""
    return "".join(text.split())
