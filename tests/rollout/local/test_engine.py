"""The embedded engine: what it samples and reports. Neither depends on the rest of the batch."""

import asyncio
import math

import pytest
import torch

from megarl.errors import RunError, UserError
from megarl.rollout.engine import Sampling
from megarl.rollout.local.slots import SlotTable
from megarl.types import Span
from tests.support.local_engine import close, prompt, steps
from tests.support.tiny_rollout import teacher_forced


def test_log_probs_are_transformers(make_engine, qwen3):
    """10 requests of mixed lengths and temperatures through 4 slots: every reported log-prob is transformers' at the
    request's temperature, 1 for greedy ones. Float32, max |difference| 1e-4."""

    async def run():
        engine = await make_engine()
        kinds = [1.0, 0.6, 0.0]
        jobs = [(prompt(i, 1 + 3 * i), kinds[i % 3], 5 + 7 * (i % 4)) for i in range(10)]
        requests = [
            engine.generate(ids, Sampling(max_tokens=n, temperature=t, top_p=0.9, seed=i), str(i))
            for i, (ids, t, n) in enumerate(jobs)
        ]
        for (ids, temperature, n), made in zip(jobs, await asyncio.gather(*requests), strict=True):
            assert len(made.token_ids) == n and made.finish == "length" and made.spans == [Span(1, 0, n)]
            close(made.logprobs, teacher_forced(qwen3, ids, made.token_ids, temperature or 1.0))
        greedy = torch.tensor([[*jobs[2][0], *(await engine.generate(jobs[2][0], Sampling(9, 0.0), "g")).token_ids]])
        with torch.no_grad():
            best = qwen3(greedy).logits[0].argmax(-1)
        assert best[len(jobs[2][0]) - 1 : -1].tolist() == greedy[0, len(jobs[2][0]) :].tolist()

    asyncio.run(run())


def test_tokens_do_not_depend_on_the_batch(make_engine):
    """The same request alone, in a crowd, and in another crowd draws the same tokens; another seed draws others."""

    async def run():
        alone = await (await make_engine()).generate(prompt(0, 9), Sampling(40, seed=5), "a")
        for crowd in (3, 9):
            engine = await make_engine()
            noise = [engine.generate(prompt(i, 2 + i), Sampling(4 + 5 * i, seed=i), f"n{i}") for i in range(1, crowd)]
            made, *_ = await asyncio.gather(engine.generate(prompt(0, 9), Sampling(40, seed=5), "a"), *noise)
            assert made.token_ids == alone.token_ids
        other = await engine.generate(prompt(0, 9), Sampling(40, seed=6), "b")
        assert other.token_ids != alone.token_ids

    asyncio.run(run())


def test_stops(make_engine, words):
    """Token ids, token sequences and stand-alone words end a generation with every sampled token kept; the word one
    token later, and its `stop_start` is where it began."""

    async def run():
        engine = await make_engine()
        whole = (await engine.generate(prompt(3, 5), Sampling(60, seed=1), "w")).token_ids
        later = next(i for i in range(10, 60) if whole[i] not in whole[:i])
        for stop, what, length in (
            ({"stop_token_ids": (whole[later], 0)}, whole[later], later + 1),
            ({"stop_sequences": ((63, whole[later]), tuple(whole[later - 2 : later + 1]))}, None, later + 1),
            ({"stop_words": (words.text([whole[later]]),)}, words.text([whole[later]]), later + 2),
            ({"stop_texts": (words.text([whole[later]]),)}, words.text([whole[later]]), later + 1),
        ):
            made = await engine.generate(prompt(3, 5), Sampling(60, seed=1, **stop), "s")
            assert made.token_ids == whole[:length] and made.finish == "stop"
            assert made.matched_stop == (what or tuple(whole[later - 2 : later + 1]))
            assert made.stop_start == (later if what is not None else later - 2)
        made = await engine.generate(
            prompt(3, 5), Sampling(later + 1, seed=1, stop_words=(words.text([whole[later]]),)), "s"
        )
        assert made.finish == "length"  # the word's end was never confirmed …
        sampling = Sampling(9, seed=1, offset=later + 1, stop_words=(words.text([whole[later]]),))
        made = await engine.generate(prompt(3, 5) + made.token_ids, sampling, "s")
        assert made.token_ids == whole[later + 1 : later + 2] and made.stop_start == -1  # … until the continuation

    asyncio.run(run())


def test_a_generation_ends_when_its_log_probs_sum_to_too_little(make_engine):
    """The first token does not count; the end is that of each request, also where it has moved to another slot."""

    async def run():
        engine = await make_engine(batch_slots=5)
        prompts = [prompt(seed, 4) for seed in range(5)]
        whole = await asyncio.gather(
            *[engine.generate(p, Sampling(30, seed=1), f"w{i}") for i, p in enumerate(prompts)]
        )
        least = [
            None,
            0.0,
            *(math.fsum(w.logprobs[1:n]) - 1e-4 for w, n in zip(whole[2:], (20, 9, 14), strict=True)),
        ]
        ended = await asyncio.gather(
            *[
                engine.generate(p, Sampling(30, seed=1, min_logprob=bound), f"e{i}")
                for i, (p, bound) in enumerate(zip(prompts, least, strict=True))
            ]
        )
        assert [len(e.token_ids) for e in ended] == [30, 2, 21, 10, 15]
        assert [e.finish for e in ended] == ["length"] + ["abort"] * 4
        for whole_one, e in zip(whole, ended, strict=True):
            assert e.token_ids == whole_one.token_ids[: len(e.token_ids)] and e.spans[-1].end == len(e.token_ids)

    asyncio.run(run())


def test_abort(make_engine):
    """A running request returns what it has, a waiting one nothing; its slot goes to the next. Unknown ids are ignored,
    and a cancelled caller frees its slot."""

    async def run():
        engine = await make_engine(batch_slots=1)
        reached = steps(engine, 6)
        running = asyncio.ensure_future(engine.generate(prompt(0, 5), Sampling(50, seed=1), "running"))
        waiting = asyncio.ensure_future(engine.generate(prompt(1, 5), Sampling(50, seed=1), "waiting"))
        cancelled = asyncio.ensure_future(engine.generate(prompt(1, 5), Sampling(50, seed=1), "cancelled"))
        third = asyncio.ensure_future(engine.generate(prompt(2, 5), Sampling(3, seed=1), "third"))
        await reached.wait()
        await engine.abort("waiting")
        await engine.abort("nobody")
        await engine.abort("running")
        cancelled.cancel()
        made = await running
        assert made.finish == "abort" and len(made.token_ids) == 6 and made.spans == [Span(1, 0, 6)]
        assert (await waiting).token_ids == [] and (await waiting).finish == "abort"
        assert len((await third).token_ids) == 3
        again = await engine.generate(prompt(0, 5), Sampling(6, seed=1), "cancelled")
        assert again.token_ids == made.token_ids

    asyncio.run(run())


def test_score_is_transformers_and_disturbs_nothing(make_engine, qwen3):
    async def run():
        engine = await make_engine()
        ids = prompt(6, 33)
        reached = steps(engine, 5)
        going = asyncio.ensure_future(engine.generate(prompt(0, 9), Sampling(40, seed=3), "g"))
        await reached.wait()
        scored = await engine.score(ids)
        made = await going
        close(scored, teacher_forced(qwen3, ids[:1], ids[1:]))
        close(made.logprobs, teacher_forced(qwen3, prompt(0, 9), made.token_ids))
        assert await engine.score(ids[:1]) == []

    asyncio.run(run())


def test_refusals(make_engine, qwen3):
    """Requests that cannot fit, two with one id, and an engine without weights, with broken ones or closed."""
    state = qwen3.state_dict()

    async def run():
        engine = await make_engine()
        with pytest.raises(UserError, match="max_length: 60 tokens and 40 new ones.*96; at least 100"):
            await engine.generate(prompt(0, 60), Sampling(40), "a")
        with pytest.raises(UserError, match="at least one token"):
            await engine.generate([], Sampling(4), "a")
        with pytest.raises(UserError, match="max_tokens: 0"):
            await engine.generate([1], Sampling(0), "a")
        twice = [engine.generate([5], Sampling(4), "same") for _ in range(2)]
        results = await asyncio.gather(*twice, return_exceptions=True)
        assert [isinstance(r, RunError) for r in results] == [False, True]
        await engine.update_weights(2, {**state, "model.norm.weight": torch.full((32,), torch.nan)}.items())
        for name in ("nan", "again"):  # each by itself: the engine goes on
            with pytest.raises(RunError, match="not finite"):
                await engine.generate([5], Sampling(4), name)
        await engine.update_weights(3, state.items())
        assert (await engine.generate([5], Sampling(4), "right")).finish == "length"
        engine = await make_engine()
        reached = steps(engine, 3)
        going = asyncio.ensure_future(engine.generate([5], Sampling(40), "g"))
        await reached.wait()
        await engine.close()
        with pytest.raises(RunError, match="closed"):
            await going

    asyncio.run(run())


def test_no_request_outlives_the_task_that_decodes(make_engine):
    """Whatever ends that task (here a cancellation; a test's time limit raises in it): every request fails with it."""

    def cancelled() -> bool:
        raise asyncio.CancelledError

    async def run():
        engine = await make_engine(batch_slots=1)
        reached = steps(engine, 3)
        going = [asyncio.ensure_future(engine.generate([5], Sampling(40), name)) for name in ("running", "waiting")]
        await reached.wait()
        engine.step = cancelled
        for request in going:
            with pytest.raises(RunError, match="ended by CancelledError"):
                await asyncio.wait_for(request, 60)

    asyncio.run(run())


def test_random_traffic_is_right(make_engine, qwen3):
    """A hundred requests that arrive while others run: continuations, forks, probes, aborts and repeated prompts in
    random order through three slots. Every log-prob is transformers'. The random order is fixed by its seed."""
    generator = torch.Generator().manual_seed(0)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    async def run():
        engine = await make_engine(batch_slots=3)
        known = [prompt(i, 4 + 2 * i) for i in range(4)]
        made: list[tuple[list[int], object]] = []

        async def worker(name: str):
            for i in range(20):
                base = known[pick(len(known))]
                kind = pick(4)
                if kind == 0:
                    base = [*base[: 1 + pick(len(base))], *prompt(pick(50), 1 + pick(4))]
                base = base[:60]
                sampling = Sampling(1 + pick(12), seed=pick(1000), offset=min(kind, len(base)), scratch=kind == 1)
                request = asyncio.ensure_future(engine.generate(base, sampling, f"{name}|{i}"))
                if kind == 2:
                    await asyncio.sleep(0)
                    await engine.abort(f"{name}|{i}")
                generation = await request
                made.append((base, generation))
                known.append([*base, *generation.token_ids])

        await asyncio.gather(*(worker(f"w{i}") for i in range(5)))
        return made

    made = asyncio.run(run())
    assert len(made) == 100
    for ids, generation in made:
        if generation.token_ids:
            close(generation.logprobs, teacher_forced(qwen3, ids, generation.token_ids))


def test_a_continuation_draws_the_same_wherever_it_is_moved(make_engine, monkeypatch):
    """Its position in the response is part of its draws, and goes with it into another slot."""
    moved: list[tuple[int, int]] = []
    move = SlotTable.move
    monkeypatch.setattr(SlotTable, "move", lambda self, *slots: (moved.append(slots), move(self, *slots))[1])
    continuation = Sampling(40, seed=7, offset=9)

    async def run(others: int):
        engine = await make_engine()
        reached = steps(engine, 2)
        requests = [engine.generate(prompt(i, 6), Sampling(8, seed=i), f"short{i}") for i in range(others)]
        short = [asyncio.ensure_future(request) for request in requests]
        if short:
            await reached.wait()  # they have the lower slots
        made = await engine.generate(prompt(9, 12), continuation, "c|1")
        await asyncio.gather(*short)
        return made.token_ids

    alone = asyncio.run(run(0))
    assert not moved
    assert asyncio.run(run(3)) == alone
    assert moved
