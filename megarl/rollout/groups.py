"""A group of completions for every prompt, all at once: training rollouts (with early exit or plain) and evaluation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.rollout.detokenize import Vocabulary, vocabulary_of
from megarl.rollout.early_exit.completion_builder import CompletionBuilder
from megarl.rollout.early_exit.plan import ExitReason, Plan
from megarl.rollout.early_exit.thinker import complete
from megarl.rollout.engine import Engine, Sampling
from megarl.types import Completion, Group, Prompt, derive_seed

OnDone = Callable[[Prompt, Completion], None] | None  # called with each completion as soon as it is done


async def rollout(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: config.Settings,
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    on_done: OnDone = None,
) -> list[Group]:
    """A training group for every prompt, in order. All completions run at once; none waits for another."""
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

    return await _groups(prompts, size, one, on_done)


async def evaluation(
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: config.Settings,
    tokenizer: PreTrainedTokenizerBase,
    on_done: OnDone = None,
) -> list[Group]:
    """Plain completions of held-out prompts: evaluation never exits early. Every call makes the same draws."""
    vocabulary = vocabulary_of(tokenizer, settings.model.path)
    chosen = settings.evaluation
    sampling = Sampling(
        max_tokens=chosen.max_response_tokens or settings.rollout.max_response_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        stop_token_ids=vocabulary.end_ids,
        forget=True,
    )

    def one(prompt: Prompt, index: int) -> Coroutine[Any, Any, Completion]:
        seed = derive_seed(settings.seed, "evaluation", prompt.uid, index)
        return plain(engine, prompt, index, sampling, vocabulary, seed, f"evaluation/{prompt.uid}/{index}")

    return await _groups(prompts, chosen.samples, one, on_done)


async def plain(
    engine: Engine, prompt: Prompt, index: int, sampling: Sampling, vocabulary: Vocabulary, seed: int, name: str
) -> Completion:
    """One completion without early exit; `name` begins its request ids."""
    builder = CompletionBuilder(prompt.token_ids)
    generation = await engine.generate(builder.token_ids, sampling._replace(seed=seed), f"{name}|0")
    builder.append(generation)
    return builder.build(prompt.uid, index, generation.finish, ExitReason.PLAIN, vocabulary)


async def _groups(prompts: Sequence[Prompt], size: int, one: Any, on_done: OnDone) -> list[Group]:
    """Run `one(prompt, index)` for every completion at once. The first failure ends the others."""

    async def complete_one(prompt: Prompt, index: int) -> Completion:
        completion: Completion = await one(prompt, index)
        if on_done:
            on_done(prompt, completion)
        return completion

    tasks = [asyncio.ensure_future(complete_one(prompt, index)) for prompt in prompts for index in range(size)]
    try:
        completions = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return [Group(prompt, list(completions[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]
