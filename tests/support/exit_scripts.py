"""Policies whose every token is chosen, for early exit; and what holds of every completion."""

import asyncio
import hashlib
import math

import numpy as np
import pytest

from megarl import config
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.early_exit import thinker
from megarl.rollout.early_exit.plan import Plan
from megarl.types import Completion, Origin, Prompt
from tests.support.scripted_engine import ScriptedEngine

PROMPT = Prompt("p0", (40, 41), "", "", "")
DEFAULTS = {"enabled": True, "near_budget": 0, "inducer": "\nboxed", "closing": "\n</think>\n\n"}


def plan(vocabulary: Vocabulary, budget: int = 200, **changes) -> Plan:
    exits = config.EarlyExit(**{**DEFAULTS, **changes})
    return Plan.of(config.Rollout(max_response_tokens=budget, early_exit=exits), vocabulary)


class Script:
    """A thought, trial answers with the probability of their tokens, an answer: each the text to be sampled there."""

    def __init__(self, vocabulary: Vocabulary, thought: str, trials: list[tuple[str, float]], answer: str) -> None:
        self.vocabulary = vocabulary
        self.thought, self.answer = self.ids(thought), self.ids(answer)
        self.trials = [(self.ids(text), p) for text, p in trials]
        self.probes = 0
        self.answer_start: int | None = None

    def ids(self, text: str) -> list[int]:
        return self.vocabulary.encode(text)

    def __call__(self, ids, sampling, i):
        if sampling.scratch:
            if i == 0:
                self.trial, self.probability = self.trials[self.probes]
                self.probes += 1
            return self.trial[i % len(self.trial)], 0.0 if i == 0 else math.log(self.probability)
        position = len(ids) - len(PROMPT.token_ids)
        if not sampling.stop_words and sampling.stop_token_ids == self.vocabulary.end_ids:  # the answer's stops
            self.answer_start = position if self.answer_start is None else self.answer_start
            return self.answer[position - self.answer_start], -2.0
        return self.thought[position], -1.0


def run(vocabulary: Vocabulary, script, **changes) -> tuple[Completion, ScriptedEngine]:
    engine = ScriptedEngine(vocabulary, script)
    made = asyncio.run(thinker.complete(engine, PROMPT, 0, plan(vocabulary, **changes), 7, "0/p0/0"))
    check_exact(made, engine)
    return made, engine


def check_exact(made: Completion, engine: ScriptedEngine) -> None:
    """What holds of every completion: arrays fit, log-probs are missing exactly where tokens were inserted, and what
    the engine was sent is a prefix of the result. What was sent before an exit may go beyond the exit's cut: by the
    speculative continuation, or by a token that confirmed one marker and began the next."""
    n = len(made)
    assert len(made.origin) == len(made.logprobs) == n
    assert (np.isnan(made.logprobs) == (made.origin == Origin.INSERTED)).all()
    assert [s.start for s in made.spans] == [0] * bool(n) and (not n or made.spans[-1].end == n)
    whole = [*PROMPT.token_ids, *made.token_ids.tolist()]
    cut = len(PROMPT.token_ids) + min(np.flatnonzero(made.origin == Origin.INSERTED), default=n)
    probes = iter(made.probes)
    for call in engine.calls:
        sent = call.token_ids
        if call.sampling.scratch:
            sent = sent[: len(PROMPT.token_ids) + next(probes).position]
        elif "answer" not in call.request_id:
            sent = sent[:cut]
        assert sent == whole[: len(sent)]
    assert len({call.request_id for call in engine.calls}) == len(engine.calls)


EOS, CLOSE = "<eos>", "</think>"
THOUGHT = "1+1=2 Wait, 2-1=1. Wait, so 2" + CLOSE + "\n\n2" + EOS
CONFIDENT, DOUBTFUL = ("{2}" + CLOSE, 0.99), ("{2}" + CLOSE, 0.5)
SCHEDULES = pytest.mark.parametrize("schedule", ["blocking", "speculative"])


PIECES = ["1", " 2", "W", "a", "it", "Wa", "Wait", " Wait", "\n\nWait", "ing", ",", ". ", "é", "\n\n", EOS, CLOSE]


def hashed_policy(vocabulary: Vocabulary, salt: int, marker_share: int):
    """Tokens that are a function of what precedes them, so that an uninterrupted generation is defined."""
    pool = [vocabulary.encode(text)[-1] for text in PIECES[:-2] * 3 + [" Wait", ","] * marker_share + PIECES[-2:]]
    pool += list({i for i in vocabulary.encode("é等")})

    def policy(ids, sampling, i):
        digest = hashlib.blake2b(f"{salt}{ids}".encode(), digest_size=8).digest()
        logprob = math.log([0.999, 0.9, 1.0][digest[1] % 3]) if sampling.scratch else -1.0
        if sampling.scratch and digest[0] < 90:
            return vocabulary.encode(CLOSE)[0], logprob
        return pool[int.from_bytes(digest[2:6], "little") % len(pool)], logprob

    return policy
