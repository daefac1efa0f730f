"""Early exit of whole groups, on chosen tokens and on the local engine; its settings and metrics."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from megarl import config
from megarl.errors import UserError
from megarl.rollout import groups
from megarl.rollout.early_exit import metrics, plan
from megarl.rollout.early_exit.plan import ExitReason
from megarl.types import Completion, Origin, Probe, Prompt, ScoredCompletion, ScoredGroup, Span
from tests.support.exit_scripts import DEFAULTS, PROMPT, SCHEDULES, hashed_policy
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_rollout import teacher_forced


def whole_settings(**changes) -> config.Settings:
    return config.Settings(
        run=Path("run"),
        model=config.Model(path=Path("none")),
        data=config.Data(train=[Path("none")]),
        batch=config.Batch(prompts_per_step=4, completions_per_prompt=4),
        rollout=config.Rollout(max_response_tokens=60, early_exit=config.EarlyExit(**{**DEFAULTS, **changes})),
    )


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (40 + i, 41), "", "", "") for i in range(count)]


@SCHEDULES
def test_no_barrier(byte_vocabulary, schedule):
    """One completion is held at its second request. All the others finish before it is let go, with the very same
    tokens as without it, and each is announced when it is done. Driven by events, with a deadline for a hang."""
    policy = hashed_policy(byte_vocabulary, 3, 4)
    chosen = whole_settings(schedule=schedule, max_probes=4)

    async def free():
        engine = ScriptedEngine(byte_vocabulary, policy)
        return await groups.rollout(engine, prompts(4), chosen, byte_vocabulary.tokenizer, step=3)

    expected = asyncio.run(free())
    slow = next(f"3/{g.prompt.uid}/{c.index}" for g in expected for c in g.completions if c.probes and len(c) > 1)

    async def held():
        engine = ScriptedEngine(byte_vocabulary, policy)
        engine.gates[f"{slow}|2"] = engine.gates[f"{slow}|probe2"] = asyncio.Event()
        done, rest = [], asyncio.Event()

        def on_done(prompt, completion):
            done.append(f"3/{prompt.uid}/{completion.index}")
            if len(done) == 15:
                rest.set()

        work = groups.rollout(engine, prompts(4), chosen, byte_vocabulary.tokenizer, step=3, on_done=on_done)
        task = asyncio.ensure_future(work)
        await asyncio.wait_for(rest.wait(), 60)
        assert slow not in done and not task.done()
        engine.gates[f"{slow}|2"].set()
        return await asyncio.wait_for(task, 60)

    for one, other in zip(expected, asyncio.run(held()), strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and a.probes == b.probes


def test_exit_fraction_and_evaluation(byte_vocabulary):
    """Half of each group is generated plainly, with the seeds it would have had; evaluation is plain throughout and
    the same at every call. Seeds differ between completions, steps and prompts."""
    policy = hashed_policy(byte_vocabulary, 5, 4)

    def make(kind, **changes):
        engine = ScriptedEngine(byte_vocabulary, policy)
        chosen = whole_settings(**changes)
        if kind == "evaluation":
            made = groups.evaluation(engine, prompts(3), chosen, byte_vocabulary.tokenizer)
        else:
            made = groups.rollout(engine, prompts(3), chosen, byte_vocabulary.tokenizer, kind)
        return asyncio.run(made), engine

    half, engine = make(1, exit_fraction=0.5)
    for group in half:
        reasons = [c.exit_reason for c in group.completions]
        assert reasons[2:] == ["plain"] * 2 and "plain" not in reasons[:2]
    off, engine_off = make(1, enabled=False)
    assert all(c.exit_reason == "plain" for g in off for c in g.completions)

    def first_seeds(engine):
        return {
            c.request_id.rpartition("|")[0]: c.sampling.seed for c in reversed(engine.calls) if not c.sampling.scratch
        }

    assert first_seeds(engine).keys() == first_seeds(engine_off).keys()
    assert len(set(first_seeds(engine_off).values())) == 12
    assert not set(first_seeds(engine_off).values()) & set(first_seeds(make(2, enabled=False)[1]).values())
    for seed in (c.sampling.seed for c in engine.calls if c.sampling.offset == 0):
        assert seed in first_seeds(engine_off).values()
    evaluated, engine = make("evaluation")
    assert all(c.exit_reason == "plain" for g in evaluated for c in g.completions)
    assert {c.sampling.temperature for c in engine.calls} == {0.6}
    again, _ = make("evaluation")
    assert [c.text for g in again for c in g.completions] == [c.text for g in evaluated for c in g.completions]


def test_one_failure_ends_all(byte_vocabulary):
    """The first completion that fails ends the rollout with its error; the others' requests are cancelled."""
    policy = hashed_policy(byte_vocabulary, 3, 4)

    def failing(ids, sampling, i):
        if ids[0] == 42 and i == 3:
            raise RuntimeError("engine lost")
        return policy(ids, sampling, i)

    async def go():
        engine = ScriptedEngine(byte_vocabulary, failing)
        engine.gates["1/p0/"] = asyncio.Event()  # would wait for ever
        async with asyncio.timeout(60):
            with pytest.raises(RuntimeError, match="engine lost"):
                await groups.rollout(engine, prompts(4), whole_settings(), byte_vocabulary.tokenizer, 1)
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


@SCHEDULES
def test_on_the_local_engine(make_engine, qwen3, words, schedule):
    """Sixteen completions of the tiny model through 6 slots: sampled tokens carry transformers' log-probs, and with a
    threshold that nothing passes the responses are the plain ones, token for token."""
    marks = [f"w{i}" for i in range(0, 60, 7)]
    exits = {
        "markers": marks,
        "think_end": "w1",
        "closing": "w1",
        "inducer": "w2 w3",
        "probe_tokens": 6,
        "schedule": schedule,
    }
    chosen = whole_settings(**{**exits, "strict": False, "threshold": 0.05})
    never = whole_settings(**{**exits, "threshold": 1.0, "repetition_limit": 1000})

    async def go(settings):
        engine = await make_engine(batch_slots=6, max_length=128)
        return await groups.rollout(engine, prompts(4), settings, words.tokenizer, 1)

    made = asyncio.run(go(chosen))
    reasons = {c.exit_reason for g in made for c in g.completions}
    assert ExitReason.CONFIDENT in reasons and len(reasons) > 1
    for group in made:
        for c in group.completions:
            expected = teacher_forced(qwen3, list(group.prompt.token_ids), c.token_ids.tolist()).numpy()
            sampled = c.origin == Origin.SAMPLED
            np.testing.assert_allclose(c.logprobs[sampled], expected[sampled], atol=1e-4)
    plainly = asyncio.run(go(whole_settings(enabled=False)))
    stopped = asyncio.run(go(never))
    for one, other in zip(plainly, stopped, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            n = len(b) if b.exit_reason in (ExitReason.THINK_END, ExitReason.END_OF_TEXT) else 54
            assert a.token_ids[:n].tolist() == b.token_ids[:n].tolist()


# ---- settings and metrics


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markers": ["Hmm"]}, "early_exit.markers: the tokenizer cannot encode 'Hmm': it becomes"),
        ({"inducer": "Wait what"}, "early_exit.inducer: the tokenizer cannot encode 'Wait what'"),
        ({"think_end": ""}, "early_exit.think_end: the tokenizer cannot encode ''"),
        ({"closing": "w1 " * 9}, "early_exit.thinking_share: 0.9 of 60 tokens leaves 6.*need 10; at most 0.833"),
        ({"variant": "paper_text", "inducer": "w1 w2"}, "thinking_share.*need 23; at most 0.616"),
        ({"closing": "w1 " * 60}, "rollout.max_response_tokens: 60 leaves no room.*at least 62"),
    ],
)
def test_bad_settings_are_refused(words, changes, message):
    """At start, on one line, with the setting's name."""
    good = {"enabled": True, "think_end": "w1", "closing": "w1", "inducer": "w2 w3"}
    rollout = config.Rollout(max_response_tokens=60, early_exit=config.EarlyExit(**{**good, **changes}))
    with pytest.raises(UserError, match=message) as caught:
        plan.check(rollout, words.tokenizer)
    assert "\n" not in str(caught.value)
    plan.check(config.Rollout(max_response_tokens=60, early_exit=config.EarlyExit(**good)), words.tokenizer)
    plan.check(rollout.model_copy(update={"early_exit": config.EarlyExit()}), words.tokenizer)  # off


def test_longest_sequence_covers_every_request(byte_vocabulary):
    """No request of a run with probes exceeds the bound the engine is built with."""
    chosen = whole_settings(near_budget=0)
    engine = ScriptedEngine(byte_vocabulary, hashed_policy(byte_vocabulary, 3, 8))
    asyncio.run(groups.rollout(engine, prompts(4), chosen, byte_vocabulary.tokenizer, 1))
    longest = max(len(c.token_ids) + c.sampling.max_tokens for c in engine.calls)
    slack = chosen.data.max_prompt_tokens - 2
    assert longest <= chosen.longest_sequence - slack
    assert whole_settings(enabled=False).longest_sequence == 2048 + 60


def scored(reason: str, length: int, score: float = 0.0, probes: tuple = (), discarded: int = 0) -> ScoredCompletion:
    zeros = np.zeros(length)
    completion = Completion(
        "p", 0, zeros.astype(np.int32), zeros.astype(np.uint8), zeros.astype(np.float32), "stop", (Span(1, 0, length),),
        reason, probes, discarded,
    )  # fmt: skip
    return ScoredCompletion(completion, "right" if score >= 1 else "wrong", score, True, steps=1, reward=score)


def test_metrics():
    """By hand: two groups; only the first has natural completions to compare its early ones with."""
    probes = (Probe(3, (1, 2), 0.55, False), Probe(9, (1, 2, 3), 0.97, True))
    groups = [
        ScoredGroup(PROMPT, [scored("confident", 10, 1.0, probes, 4), scored("plain", 30), scored("think_end", 40)]),
        ScoredGroup(PROMPT, [scored("confident", 10, 0.0, probes[1:]), scored("budget", 60)]),
    ]
    found = metrics.summarise(groups)
    assert found["early_exit_fraction"] == 0.4
    assert found["exits/confident"] == 2 and found["exits/budget"] == 1 and found["exits/aborted"] == 0
    assert found["probe_tokens"] == 8 and found["discarded_tokens"] == 4 and found["tokens_saved"] == 25
    assert found["probes_per_completion"] == 0.6 and found["exits_right"] == 0.5
    assert found["probe_confidence/0.9"] == 2 and found["probe_confidence/0.5"] == 1
    # one probe of .55 in a right completion; two of .97, one of them right
    assert found["probe_calibration_error"] == pytest.approx((0.45 + 2 * 0.47) / 3)
    nothing = metrics.summarise([])
    assert nothing.keys() == found.keys() and not any(nothing.values())
