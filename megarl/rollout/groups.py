"""A group of completions for every prompt, all at once: training rollouts, with early exit or plain, and evaluation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.rollout.detokenize import Vocabulary, vocabulary_of
from megarl.rollout.early_exit.completion_builder import Draft, text_of
from megarl.rollout.early_exit.plan import ExitReason, Plan
from megarl.rollout.early_exit.thinker import complete
from megarl.rollout.engine import Engine, Sampling
from megarl.types import Completion, Group, Prompt, derive_seed


def longest_sequence(settings: config.Settings) -> int:
    """Tokens, prompt included, of the longest request that a run makes of an engine."""
    exits = settings.rollout.early_exit
    response = max(settings.rollout.max_response_tokens, settings.evaluation.max_response_tokens or 0)
    # A tokenizer makes at most one token of every byte.
    probe = len(exits.trial_inducer.encode()) + exits.probe_tokens if exits.enabled else 0
    return settings.data.max_prompt_tokens + response + probe


async def rollout(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: config.Settings,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
) -> list[Group]:
    """A training group for every prompt, in order: all completions run at once, none waits for another."""
    vocabulary = vocabulary_of(tokenizer, settings.model.path)
    plan = Plan.of(settings.rollout, vocabulary)
    size, exits = settings.batch.completions_per_prompt, settings.rollout.early_exit
    exiting = round(exits.exit_fraction * size) if exits.enabled else 0

    def one(prompt: Prompt, index: int) -> Coroutine[Any, Any, Completion]:
        seed = derive_seed(settings.seed, step, prompt.uid, index)
        name = f"{step}/{prompt.uid}/{index}"
        if index < exiting:
            return complete(engine, prompt, index, plan, seed, name)
        return plain(engine, prompt, index, plan.sampling, vocabulary, seed, name)

    return await _groups(prompts, size, one)


async def evaluation(
    engine: Engine, prompts: Sequence[Prompt], settings: config.Settings, tokenizer: PreTrainedTokenizerBase
) -> list[Group]:
    """Plain completions of held-out prompts: evaluation never exits early. The same draws at every call."""
    vocabulary = vocabulary_of(tokenizer, settings.model.path)
    chosen = settings.evaluation
    sampling = Sampling(
        max_tokens=chosen.max_response_tokens or settings.rollout.max_response_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        stop_token_ids=vocabulary.end_ids,
    )

    def one(prompt: Prompt, index: int) -> Coroutine[Any, Any, Completion]:
        seed = derive_seed(settings.seed, "evaluation", prompt.uid, index)
        return plain(engine, prompt, index, sampling, vocabulary, seed, f"evaluation/{prompt.uid}/{index}")

    return await _groups(prompts, chosen.samples, one)


async def plain(
    engine: Engine, prompt: Prompt, index: int, sampling: Sampling, vocabulary: Vocabulary, seed: int, name: str
) -> Completion:
    """One completion without early exit; `name` begins its request ids."""
    draft = Draft(prompt.token_ids)
    generation = await engine.generate(draft.token_ids, sampling._replace(seed=seed), f"{name}|0")
    draft.append(generation)
    text = text_of(draft, vocabulary)
    return draft.completion(prompt.uid, index, generation.finish, ExitReason.PLAIN, text)


async def _groups(prompts: Sequence[Prompt], size: int, one: Any) -> list[Group]:
    """Run `one(prompt, index)` for every completion at once; the first failure ends the others."""
    tasks = [asyncio.ensure_future(one(prompt, index)) for prompt in prompts for index in range(size)]
    try:
        completions = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return [Group(prompt, list(completions[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]
