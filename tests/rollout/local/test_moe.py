"""The experts that the embedded engine reports are those of transformers' routers, wherever the cache came from."""

from __future__ import annotations

import asyncio
import hashlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from megarl import config
from megarl.errors import UserError
from megarl.rollout.early_exit import thinker
from megarl.rollout.early_exit.plan import Plan
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.local.engine import LocalEngine
from megarl.types import Prompt
from tests.support.tiny_models import shape_of
from tests.support.tiny_rollout import SIZES, named, randomise

LAYERS, TOP_K = 3, 2


@pytest.fixture(scope="module")
def mixture():
    """A random mixture of 8 experts over 64 tokens, in float32."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES,
        num_hidden_layers=LAYERS,
        num_experts=8,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=16,
        norm_topk_prob=True,
    )
    return randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


async def engine_of(mixture, words, **more) -> LocalEngine:
    settings = {"batch_slots": 4, "max_length": 160, "keep_experts": True, **more}
    engine = LocalEngine(shape_of(mixture.config), words, **settings)
    await engine.update_weights(1, named(mixture).items())
    return engine


def routers(mixture, token_ids: list[int]) -> np.ndarray:
    """The experts that transformers chooses for every token, [n, layers, top_k], in ascending order."""
    with torch.no_grad():
        logits = mixture(torch.tensor([token_ids]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(TOP_K).indices for layer in logits], 1).sort(-1).values.numpy()


def check(mixture, prompt: list[int], made: Generation) -> None:
    whole = [*prompt, *made.token_ids]
    assert made.experts.dtype == np.int16 and made.experts.shape == (len(whole) - 1, LAYERS, TOP_K)
    np.testing.assert_array_equal(np.sort(made.experts, -1), routers(mixture, whole)[:-1])


def test_experts_in_a_crowd_and_in_continuations(mixture, words):
    """12 requests through 4 slots, four of them of one prompt, which is fed once and copied; each is then continued,
    twice with a detour by a probe, which forks off the cache and reports its own."""

    async def one(engine: LocalEngine, i: int) -> None:
        random = np.random.default_rng(i if i > 3 else 0)
        prompt = random.integers(3, 64, 5 + 2 * (i if i > 3 else 0)).tolist()
        sampling = Sampling(6 + i, seed=i, experts=True)
        first = await engine.generate(prompt, sampling, f"{i}|0")
        check(mixture, prompt, first)
        known = [*prompt, *first.token_ids]
        if i % 3 == 0:
            question = [*known[:-3], 7, 8, 9]
            probing = Sampling(5, seed=99, offset=len(question) - len(prompt), scratch=True, experts=True)
            check(mixture, question, await engine.generate(question, probing, f"{i}|probe"))
        going_on = Sampling(9, seed=i, offset=len(first.token_ids), experts=True)
        check(mixture, known, await engine.generate(known, going_on, f"{i}|1"))

    async def run() -> None:
        engine = await engine_of(mixture, words)
        await asyncio.gather(*(one(engine, i) for i in range(12)))
        assert (await engine.generate([3, 4], Sampling(4), "unasked")).experts is None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("variant", "schedule"),
    [pytest.param("released", "blocking", marks=pytest.mark.slow), ("paper_text", "speculative")],
)
def test_completions_of_early_exit_know_their_experts(mixture, words, variant, schedule):
    """Of every token that a generation was fed, inserted ones too; -1 only at the end, behind the last one."""
    exits = config.EarlyExit(
        enabled=True, inducer="w1 w2", closing="w3 w4", probe_tokens=4, threshold=0.05, strict=False, near_budget=0,
        think_end="</think>", max_probes=3, variant=variant, schedule=schedule, repetition_limit=50,
    )  # fmt: skip
    plan = Plan.of(config.Rollout(max_response_tokens=80, replay_routing=True, early_exit=exits), words)

    async def run() -> list:
        engine = await engine_of(mixture, words)
        jobs = []
        for i in range(16):
            seed = int(hashlib.sha1(str(i).encode()).hexdigest()[:8], 16)
            prompt = Prompt(f"p{i % 4}", (5 + i % 4, 9), "", "", "")
            jobs.append(thinker.complete(engine, prompt, i, plan, seed, f"0/p{i % 4}/{i}"))
        return await asyncio.gather(*jobs)

    left_open, reasons = 0, set()
    for i, made in enumerate(asyncio.run(run())):
        whole = [5 + i % 4, 9, *made.token_ids.tolist()]
        assert made.experts.shape == (len(whole) - 1, LAYERS, TOP_K)
        known = int((made.experts >= 0).all((1, 2)).sum())
        assert (made.experts[known:] == -1).all()
        assert known == len(whole) - 1 or made.origin[known - 2 :].any()  # inserted at the very end
        np.testing.assert_array_equal(np.sort(made.experts[:known], -1), routers(mixture, whole)[:known])
        left_open += known < len(whole) - 1
        reasons.add(made.exit_reason)
    assert "confident" in reasons and (left_open > 0) == (variant == "paper_text")


def test_an_engine_without_experts_says_so(mixture, words, make_engine):
    async def run() -> None:
        for engine in (await make_engine(keep_experts=True), await engine_of(mixture, words, keep_experts=False)):
            with pytest.raises(UserError, match="keep_experts"):
                await engine.generate([3, 4], Sampling(4, experts=True), "a")

    asyncio.run(run())
