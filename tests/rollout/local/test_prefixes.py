"""Prefixes in the embedded engine's cache: continuations, groups, probes. Nothing is computed twice."""

import asyncio

import pytest
import torch

from megarl.rollout.engine import Sampling
from tests.support.local_engine import close, prompt
from tests.support.tiny_rollout import teacher_forced


def test_continuing_draws_what_an_uninterrupted_generation_draws(make_engine, prefilled):
    """Stopped and continued at random places with the same seed and the right offset: the same tokens and log-probs,
    and nothing but the prompt is prefilled, because the cache is still in its slot."""

    async def run():
        engine = await make_engine()
        ids = prompt(0, 7)
        whole = await engine.generate(ids, Sampling(40, seed=3), "whole")
        engine = await make_engine()
        prefilled.clear()
        response, logprobs = [], []
        for piece in (1, 5, 13, 2, 19):
            sampling = Sampling(piece, seed=3, offset=len(response))
            made = await engine.generate(ids + response, sampling, f"{len(response)}")
            response += made.token_ids
            logprobs += made.logprobs
        assert response == whole.token_ids
        close(logprobs, torch.tensor(whole.logprobs))
        assert prefilled == [6]

    asyncio.run(run())


def test_a_group_shares_its_prompt(make_engine, prefilled, qwen3):
    """Six completions of one prompt through four slots prefill its tokens once; a later one finds them too."""

    async def run():
        engine = await make_engine()
        ids = prompt(1, 20)
        requests = [engine.generate(ids, Sampling(12, seed=i), str(i)) for i in range(6)]
        for made in await asyncio.gather(*requests):
            close(made.logprobs, teacher_forced(qwen3, ids, made.token_ids))
        assert sum(prefilled) == 19
        made = await engine.generate(ids, Sampling(12, seed=9), "later")
        close(made.logprobs, teacher_forced(qwen3, ids, made.token_ids))
        assert sum(prefilled) == 19

    asyncio.run(run())


def test_a_thought_that_waits_for_its_probe_keeps_its_slot(make_engine, prefilled):
    """Stopped at a word, and continued after others have come and gone: nothing is prefilled anew."""

    async def run():
        engine = await make_engine()
        ids, marks = prompt(4, 12), tuple(f"w{i}" for i in range(0, 60, 7))
        thought = await engine.generate(ids, Sampling(40, seed=3, stop_words=marks), "thought|0")
        assert thought.finish == "stop"
        for n in range(5):
            await engine.generate(prompt(10 + n, 6), Sampling(4, seed=n), f"{n}")
        await asyncio.gather(*(engine.generate(prompt(20 + n, 6), Sampling(4 + n, seed=n), f"{n}") for n in range(3)))
        prefilled.clear()
        going_on = Sampling(9, seed=3, offset=len(thought.token_ids))
        await engine.generate(ids + thought.token_ids, going_on, "thought|1")
        assert not prefilled

    asyncio.run(run())


@pytest.mark.parametrize("beside", [False, True], ids=["after the stop", "beside the continuation"])
def test_a_probe_leaves_no_trace(make_engine, prefilled, qwen3, beside):
    """A scratch request that forks an earlier point of the sequence, before or while it is continued: both are right,
    the continuation is the uninterrupted one, and only the probe's own tokens are fed again."""

    async def run():
        engine = await make_engine()
        ids = prompt(2, 8)
        whole = await engine.generate(ids, Sampling(40, seed=3), "whole")
        engine = await make_engine()
        first = await engine.generate(ids, Sampling(20, seed=3), "c|0")
        context = ids + first.token_ids
        probe = [*context[:-3], *prompt(9, 5)]
        prefilled.clear()
        asked = engine.generate(probe, Sampling(6, temperature=0.0, offset=17, scratch=True), "c|probe")
        going = engine.generate(context, Sampling(20, seed=3, offset=20), "c|1")
        trial, rest = await asyncio.gather(asked, going) if beside else (await asked, await going)
        assert first.token_ids + rest.token_ids == whole.token_ids
        close(rest.logprobs, torch.tensor(whole.logprobs[20:]))
        close(trial.logprobs, teacher_forced(qwen3, probe, trial.token_ids))
        assert sum(prefilled) <= 4 + (2 if beside else 0)

    asyncio.run(run())


def test_a_request_that_is_to_be_forgotten_changes_nothing_after_it(make_engine, prefilled):
    """Evaluations beside more slots than there are, then a group: prefilled as in a new engine, equal bit by bit.

    Without `forget` the group finds the evaluations' prefixes, and rounds otherwise.
    """

    async def group(engine):
        prefilled.clear()
        requests = [engine.generate(prompt(8, 21), Sampling(12, seed=i), f"1/a/{i}|0") for i in range(3)]
        other = engine.generate(prompt(9, 5), Sampling(12, seed=7), "1/b/0|0")
        made = await asyncio.gather(*requests, other)
        return [(each.token_ids, each.logprobs) for each in made], list(prefilled)

    async def run():
        expected = await group(await make_engine())
        seen = []
        for forget in (True, False):
            engine = await make_engine()
            held_out = [
                engine.generate(prompt(8, 14 + i), Sampling(9 + i, seed=i, forget=forget), f"evaluation/{i}/0|0")
                for i in range(9)
            ]
            await asyncio.gather(*held_out)
            seen.append(await group(engine))
        assert seen[0] == expected
        assert seen[1][1] != expected[1]

    asyncio.run(run())
