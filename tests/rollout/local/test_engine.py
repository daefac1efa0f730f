"""The embedded engine: what it samples, what it reports, and that neither depends on what else is in the batch."""

import asyncio
import math

import pytest
import torch

from megarl.errors import RunError, UserError
from megarl.rollout.engine import Sampling
from megarl.rollout.local.decoder import Decoder, Piece
from megarl.rollout.weights.verify import checksum
from megarl.types import Span
from tests.support.tiny_rollout import teacher_forced


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(logprobs, expected):
    torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)


def ticks(engine, count: int) -> asyncio.Event:
    """An event that is set when the engine has made `count` more ticks."""
    event, tick = asyncio.Event(), engine._tick
    left = [count]

    def counted():
        left[0] -= 1
        if left[0] == 0:
            event.set()
        return tick()

    engine._tick = counted
    return event


@pytest.fixture
def prefilled(monkeypatch) -> list[int]:
    """Grows by the number of tokens of every piece that is fed before a slot's newest token."""
    counts: list[int] = []

    def counting(feed):
        def fed(self, *given):
            counts.extend(int(piece.counts.sum()) for piece in given if isinstance(piece, Piece))
            return feed(self, *given)

        return fed

    for name in ("extend", "decode"):
        monkeypatch.setattr(Decoder, name, counting(getattr(Decoder, name)))
    return counts


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
                engine.generate(p, Sampling(30, seed=1, least_logprob=bound), f"e{i}")
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
        reached = ticks(engine, 6)
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


def test_weights_change_under_a_running_generation(make_engine, qwen3):
    """Two spans; each token's log-prob is that of the weights its span names, given the whole prefix: nothing of the
    old weights' cache is left, in running slots or in idle ones. A probe's branch in flight survives too."""
    changed = {name: tensor * 1.1 for name, tensor in qwen3.state_dict().items()}

    async def run():
        engine = await make_engine()
        idle = await engine.generate(prompt(4, 12), Sampling(5, seed=1), "idle")
        first = await engine.generate(prompt(5, 6), Sampling(10, seed=2), "c|0")
        reached = ticks(engine, 12)
        long = asyncio.ensure_future(engine.generate(prompt(0, 9), Sampling(40, seed=3), "long"))
        probe = [*prompt(5, 6), *first.token_ids[:7], 11, 12, 13, 14]
        branch = asyncio.ensure_future(engine.generate(probe, Sampling(30, seed=4, offset=7, scratch=True), "c|p"))
        await reached.wait()
        await engine.update_weights(2, changed.items())
        made, trial, after = await asyncio.gather(
            long, branch, engine.generate(prompt(4, 12) + idle.token_ids, Sampling(6, seed=1, offset=5), "after")
        )
        return made, trial, after, probe, idle

    made, trial, after, probe, idle = asyncio.run(run())
    old = [teacher_forced(qwen3, ids, g.token_ids) for ids, g in ((prompt(0, 9), made), (probe, trial))]
    kept = {name: tensor.clone() for name, tensor in qwen3.state_dict().items()}
    qwen3.load_state_dict(changed)
    try:
        new = [teacher_forced(qwen3, ids, g.token_ids) for ids, g in ((prompt(0, 9), made), (probe, trial))]
        close(after.logprobs, teacher_forced(qwen3, prompt(4, 12) + idle.token_ids, after.token_ids))
    finally:
        qwen3.load_state_dict(kept)
    for generation, before, behind in zip((made, trial), old, new, strict=True):
        (one, two) = generation.spans
        assert (one.version, one.start, two.version, two.end) == (1, 0, 2, len(generation.token_ids))
        assert 0 < one.end == two.start
        close(generation.logprobs, torch.cat([before[: one.end], behind[one.end :]]))
    assert after.spans == [Span(2, 0, 6)]


def test_score_is_transformers_and_disturbs_nothing(make_engine, qwen3):
    async def run():
        engine = await make_engine()
        ids = prompt(6, 33)
        reached = ticks(engine, 5)
        going = asyncio.ensure_future(engine.generate(prompt(0, 9), Sampling(40, seed=3), "g"))
        await reached.wait()
        scored = await engine.score(ids)
        made = await going
        close(scored, teacher_forced(qwen3, ids[:1], ids[1:]))
        close(made.logprobs, teacher_forced(qwen3, prompt(0, 9), made.token_ids))
        assert await engine.score(ids[:1]) == []

    asyncio.run(run())


def test_update_reports_what_it_holds(make_engine, qwen3):
    """Checksums of the tensors as stored, fused ones included."""

    async def run():
        engine = await make_engine()
        sums = await engine.update_weights(2, qwen3.state_dict().items())
        assert sums == {n: checksum(t) for n, t in qwen3.state_dict().items() if n != "lm_head.weight"}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "did not arrive.*layers.1.mlp.up_proj"),
        (lambda s: s.update({"model.layers.1.mlp.upproj.weight": torch.zeros(1)}), "no tensor.*mean '.*up_proj"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\), not \(32,\)"),
    ],
)
def test_a_bad_update_is_named_and_stops_the_engine(make_engine, qwen3, change, message):
    """Missing, unknown, mis-shaped: named; the half-updated engine refuses to serve until a whole update arrives."""
    state = dict(qwen3.state_dict())
    state.pop("lm_head.weight")
    change(state)

    async def run():
        engine = await make_engine()
        with pytest.raises(RunError, match=message):
            await engine.update_weights(2, state.items())
        with pytest.raises(RunError, match="part of the weights"):
            await engine.health()
        await engine.update_weights(3, qwen3.state_dict().items())
        await engine.health()

    asyncio.run(run())


def test_refusals(make_engine):
    """Requests that cannot fit, two with one id, and an engine without weights, with broken ones or closed."""

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
        weights = engine._decoder.weights()
        weights["model.norm.weight"][0] = float("nan")
        with pytest.raises(RunError, match="not finite"):
            await engine.generate([5], Sampling(4), "nan")
        with pytest.raises(RunError, match="not finite"):
            await engine.health()
        engine = await make_engine()
        reached = ticks(engine, 3)
        going = asyncio.ensure_future(engine.generate([5], Sampling(40), "g"))
        await reached.wait()
        await engine.close()
        with pytest.raises(RunError, match="closed"):
            await going

    asyncio.run(run())


def test_no_request_outlives_the_task_that_decodes(make_engine):
    """Whatever ends that task (here a cancellation; a test's time limit raises in it): who waits is told."""

    async def run():
        engine = await make_engine()
        reached = ticks(engine, 3)
        going = asyncio.ensure_future(engine.generate([5], Sampling(40), "g"))
        await reached.wait()
        engine._task.cancel()
        with pytest.raises(RunError, match="ended by CancelledError"):
            await asyncio.wait_for(going, 60)

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
