"""Early exit, branch by branch, on an engine whose tokens are chosen; then at random; then on the local engine."""

import asyncio
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine
from tiny_rollout import byte_level_tokenizer, teacher_forced

from megarl import config
from megarl.errors import UserError
from megarl.rollout import early_exit
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.early_exit import ExitReason, Plan
from megarl.trajectory import Completion, Group, Origin, Probe, Prompt, Span

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
    made = asyncio.run(early_exit.complete(engine, PROMPT, 0, plan(vocabulary, **changes), 7, "0/p0/0"))
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


@SCHEDULES
def test_exit_at_the_first_marker(byte_vocabulary, schedule):
    """Confident: everything behind the finished step is gone, `closing` is inserted, the answer sampled."""
    made, engine = run(byte_vocabulary, Script(byte_vocabulary, THOUGHT, [CONFIDENT], "so 2." + EOS), schedule=schedule)
    assert made.text == "1+1=2\n</think>\n\nso 2." and made.finish == "stop"
    assert made.exit_reason == ExitReason.CONFIDENT
    closing = len(byte_vocabulary.encode(DEFAULTS["closing"]))
    assert made.origin.tolist() == [0] * 5 + [1] * closing + [0] * 6
    assert [(p.position, p.accepted) for p in made.probes] == [(5, True)]
    assert made.probes[0].confidence == pytest.approx(0.99)
    assert byte_vocabulary.text(made.probes[0].token_ids) == "{2}</think>"
    assert made.discarded_tokens >= 2  # the marker and the token that confirmed it
    (probe,) = [call for call in engine.calls if call.sampling.scratch]
    assert byte_vocabulary.text(probe.token_ids[2:]) == "1+1=2\nboxed"
    assert probe.sampling.temperature == 0 and probe.sampling.max_tokens == 20


@SCHEDULES
def test_declined_markers_stay_as_they_were_sampled(byte_vocabulary, schedule):
    """Two probes are declined, the policy closes the thought itself: the response is the script, token for token."""
    script = Script(byte_vocabulary, THOUGHT, [DOUBTFUL, DOUBTFUL], "\n\n2" + EOS)
    made, _ = run(byte_vocabulary, script, schedule=schedule)
    assert made.token_ids.tolist() == byte_vocabulary.encode(THOUGHT)
    assert made.exit_reason == ExitReason.THINK_END and (made.origin == Origin.SAMPLED).all()
    assert [p.accepted for p in made.probes] == [False, False] and made.discarded_tokens == 0


@SCHEDULES
def test_exit_at_a_later_marker(byte_vocabulary, schedule):
    script = Script(byte_vocabulary, THOUGHT, [DOUBTFUL, CONFIDENT], "2" + EOS)
    made, _ = run(byte_vocabulary, script, schedule=schedule)
    assert made.text == "1+1=2 Wait, 2-1=1.\n</think>\n\n2"
    assert [p.accepted for p in made.probes] == [False, True]


@pytest.mark.parametrize(
    ("trial", "changes", "confidence"),
    [
        (("{2}" + CLOSE, 0.95), {}, 0.95),  # strictly greater is asked for
        (("{2} and so on and so on", 0.99), {}, 0.0),  # strict: not closed
        (("{2} and so on and so on", 0.99), {"strict": False}, 0.99),
        (("{2}" + EOS, 0.99), {}, 0.0),  # ended, not closed
        ((CLOSE, 0.99), {}, 0.0),  # one token: nothing to average
        (("{2}" + CLOSE, 0.99), {"threshold": 0.995}, 0.99),
    ],
)
def test_confidence(byte_vocabulary, trial, changes, confidence):
    """The mean leaves the first token out and takes the closing one in; strict mode asks for the closing one."""
    made, _ = run(byte_vocabulary, Script(byte_vocabulary, THOUGHT, [trial] * 2, "2" + EOS), **changes)
    assert made.probes[0].confidence == pytest.approx(confidence)
    assert made.probes[0].accepted == (confidence > changes.get("threshold", 0.95) + 1e-9)


@pytest.mark.parametrize(("averaging", "mean"), [("geometric", (0.9 * 0.4) ** 0.5), ("arithmetic", 0.65)])
def test_averaging(byte_vocabulary, averaging, mean):
    class Uneven(Script):
        def __call__(self, ids, sampling, i):
            token, logprob = super().__call__(ids, sampling, i)
            return token, math.log([1e-9, 0.9, 0.4][i]) if sampling.scratch else logprob

    script = Uneven(byte_vocabulary, THOUGHT, [("{2" + CLOSE, 1.0)] * 2, "2" + EOS)
    made, _ = run(byte_vocabulary, script, averaging=averaging)
    assert made.probes[0].confidence == pytest.approx(mean)


def test_end_of_text_in_the_thought(byte_vocabulary):
    """No closing, no answer; also when the end of the text is what follows a marker."""
    for thought in ("1+1=2" + EOS, "1+1=2 Wait" + EOS):
        made, engine = run(byte_vocabulary, Script(byte_vocabulary, thought, [], ""))
        assert made.token_ids.tolist() == byte_vocabulary.encode(thought) and made.finish == "stop"
        assert made.exit_reason == ExitReason.END_OF_TEXT and len(engine.calls) == 1


def test_budget(byte_vocabulary):
    """The thought gets floor(0.9 * 40) = 36 tokens, the answer what the closing leaves of 40."""
    made, _ = run(byte_vocabulary, Script(byte_vocabulary, "1+1=2 . " * 9, [], "so 2 and more"), budget=40)
    assert made.exit_reason == ExitReason.BUDGET and made.finish == "length" and len(made) == 40
    inserted = np.flatnonzero(made.origin == Origin.INSERTED)
    assert inserted[0] == 36 and len(inserted) == len(byte_vocabulary.encode(DEFAULTS["closing"]))


def test_near_the_budget_it_exits_without_asking(byte_vocabulary):
    made, engine = run(byte_vocabulary, Script(byte_vocabulary, THOUGHT, [], "2" + EOS), near_budget=175)
    assert made.exit_reason == ExitReason.NEAR_BUDGET and not made.probes
    assert made.text == "1+1=2\n</think>\n\n2"
    made, _ = run(byte_vocabulary, Script(byte_vocabulary, THOUGHT, [CONFIDENT], "2" + EOS), near_budget=174)
    assert made.exit_reason == ExitReason.CONFIDENT


def test_repetition(byte_vocabulary):
    """Three steps with the words of the step before end the thought, before the third is probed."""
    thought = "1 . Wait" + " 2 3 . Wait" * 9
    made, _ = run(byte_vocabulary, Script(byte_vocabulary, thought, [DOUBTFUL] * 9, "2" + EOS))
    assert made.exit_reason == ExitReason.REPETITION
    assert made.text == "1 . Wait" + " 2 3 . Wait" * 3 + " 2 3 .\n</think>\n\n2" and len(made.probes) == 4
    made, _ = run(byte_vocabulary, Script(byte_vocabulary, thought, [DOUBTFUL] * 9, "2" + EOS), repetition_limit=1)
    assert made.text == "1 . Wait 2 3 . Wait 2 3 .\n</think>\n\n2"


@SCHEDULES
def test_probe_limit(byte_vocabulary, schedule):
    """After two declined probes the thought runs free: markers no longer stop it."""
    thought = "".join(f"{i} Wait, " for i in range(8)) + CLOSE
    script = Script(byte_vocabulary, thought, [DOUBTFUL] * 2, "2" + EOS)
    made, engine = run(byte_vocabulary, script, max_probes=2, schedule=schedule)
    assert len(made.probes) == 2 and made.exit_reason == ExitReason.THINK_END
    assert made.text == thought + "2" and len(engine.calls) == 6
    made, engine = run(byte_vocabulary, Script(byte_vocabulary, thought, [], "2" + EOS), max_probes=0)
    assert len(engine.calls) == 2 and made.text == thought + "2"


@pytest.mark.parametrize(("phase", "text"), [("|1", "1+1="), ("|answer", "1+1=2\n</think>\n\nso 2")])
def test_abort(byte_vocabulary, phase, text):
    """An aborted thought stays as it is and says so; so does an aborted answer."""

    class Aborting(Script):
        def __call__(self, ids, sampling, i):
            if i == 3 and phase in engine.calls[-1].request_id:
                engine._aborted.add(engine.calls[-1].request_id)
            return super().__call__(ids, sampling, i)

    engine = ScriptedEngine(byte_vocabulary, Aborting(byte_vocabulary, THOUGHT, [CONFIDENT], "so 2, I think"))
    made = asyncio.run(early_exit.complete(engine, PROMPT, 0, plan(byte_vocabulary), 7, "n"))
    check_exact(made, engine)
    assert made.finish == "abort" and made.exit_reason == ExitReason.ABORTED and made.text == text


def test_text_before_the_marker_in_its_token_belongs_to_the_step():
    """A token that holds the end of a step and the marker: its text is inserted anew, blanks at its end are not."""
    vocabulary = Vocabulary(byte_level_tokenizer(["i t", "a it", "W ait", ". Ġ", ".Ġ Wait", "Ġ Wait"]))
    joined = vocabulary.encode(". Wait")
    assert len(joined) == 1
    made, engine = run(vocabulary, Script(vocabulary, "x=2. Wait, no", [CONFIDENT], "2" + EOS))
    assert made.text == "x=2.\n</think>\n\n2"
    assert made.origin.tolist()[:5] == [0, 0, 0, 1, 1] and made.probes[0].position == 3
    (probe,) = [call for call in engine.calls if call.sampling.scratch]
    assert vocabulary.text(probe.token_ids[2:]) == "x=2.\nboxed"
    made, _ = run(vocabulary, Script(vocabulary, "x=2. Wait, no" + EOS, [DOUBTFUL], "2" + EOS))
    assert made.token_ids.tolist() == vocabulary.encode("x=2. Wait, no" + EOS)


def test_markers_that_straddle_tokens_or_lie_in_words(byte_vocabulary):
    """'Waiting' and 'await' are no markers; a marker of several tokens behind half a character is one."""
    single = Vocabulary(byte_level_tokenizer(["a a"]))
    thought = "Waiting to await é等Wait等 x" + CLOSE
    for vocabulary in (single, byte_vocabulary):
        made, _ = run(vocabulary, Script(vocabulary, thought, [DOUBTFUL], "2" + EOS))
        assert len(made.probes) == 1 and made.text == thought + "2"
        made, _ = run(vocabulary, Script(vocabulary, thought, [CONFIDENT], "2" + EOS))
        assert made.text == "Waiting to await é等\n</think>\n\n2"


def test_a_marker_that_the_last_ones_confirmation_began(byte_vocabulary):
    """'Wait Wait, ' in three tokens: the token that confirms the first marker is the second one."""
    thought = "1 Wait Wait, 2" + CLOSE
    assert byte_vocabulary.encode(" Wait Wait")[0] == byte_vocabulary.encode(" Wait Wait")[1]
    made, _ = run(byte_vocabulary, Script(byte_vocabulary, thought, [DOUBTFUL, CONFIDENT], "2" + EOS))
    assert made.text == "1 Wait\n</think>\n\n2" and [p.position for p in made.probes] == [1, 2]


def test_think_end_of_several_tokens():
    """Found as text, also when its last token holds more ('>' and a line end in one)."""
    vocabulary = Vocabulary(byte_level_tokenizer(["> Ċ"]))
    end = "</thought>"
    assert len(vocabulary.encode(end)) > 1
    changes = {"think_end": end, "closing": "\n</thought>\n"}
    script = Script(vocabulary, "1 Wait, 2" + end + "\n", [("2" + end, 0.5)], "2" + EOS)
    made, _ = run(vocabulary, script, **changes)
    assert made.exit_reason == ExitReason.THINK_END and made.text == "1 Wait, 2" + end + "\n2"
    made, _ = run(vocabulary, Script(vocabulary, "1 Wait, 2", [("2" + end, 0.99)], "2" + EOS), **changes)
    assert made.text == "1 \n</thought>\n2"


def test_paper_text_variant(byte_vocabulary):
    """The trial answer, up to the end of text, is the output; every token behind the step is an inserted one."""
    changes = {"variant": "paper_text", "inducer": None}
    script = Script(byte_vocabulary, THOUGHT, [(" 2." + EOS, 0.99)], "")
    made, _ = run(byte_vocabulary, script, **changes)
    assert made.text == "1+1=2</think> The final answer is 2." and made.finish == "stop"
    assert made.token_ids[-1] == byte_vocabulary.end_ids[0] and (made.origin[5:] == Origin.INSERTED).all()
    script = Script(byte_vocabulary, THOUGHT, [(" 2. and", 0.99)], "")
    made, _ = run(byte_vocabulary, script, **changes, strict=False, probe_tokens=3)
    assert made.text == "1+1=2</think> The final answer is 2." and made.token_ids[-1] == byte_vocabulary.end_ids[0]


# ---- at random

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


@SCHEDULES
@settings(max_examples=150, deadline=None)
@given(
    salt=st.integers(0, 10**6),
    budget=st.integers(30, 120),
    marker_share=st.integers(0, 8),
    changes=st.fixed_dictionaries(
        {
            "near_budget": st.integers(0, 20),
            "max_probes": st.integers(0, 6),
            "probe_tokens": st.integers(2, 8),
            "strict": st.booleans(),
            "repetition_limit": st.integers(1, 3),
            "threshold": st.sampled_from([0.5, 0.95, 0.9995]),
        }
    ),
)
def test_any_run_is_token_exact(byte_vocabulary, schedule, salt, budget, marker_share, changes):
    """Over random scripts and settings: up to the exit the response is, token for token, what an uninterrupted
    generation samples (so no marker is doubled or lost and no probe token enters); behind it lie the inserted tokens
    and the answer; the budget holds; both schedules make the same response."""
    policy = hashed_policy(byte_vocabulary, salt, marker_share)
    changes = {**changes, "schedule": schedule}
    made, engine = run(byte_vocabulary, policy, budget=budget, **changes)
    chosen = plan(byte_vocabulary, budget=budget, **changes)

    assert len(made) <= budget
    ids, natural = list(PROMPT.token_ids), []
    while len(natural) < budget and (not natural or natural[-1] not in byte_vocabulary.end_ids):
        natural.append(policy(ids, chosen.sampling, 0)[0])
        ids.append(natural[-1])
    inserted = np.flatnonzero(made.origin == Origin.INSERTED)
    kept = int(inserted[0]) if len(inserted) else len(made)
    assert made.token_ids[:kept].tolist() == natural[:kept]
    if made.exit_reason in (ExitReason.THINK_END, ExitReason.END_OF_TEXT):
        assert made.token_ids.tolist() == natural
    else:
        text = byte_vocabulary.text(made.token_ids[inserted].tolist())
        assert text.endswith(DEFAULTS["closing"]) and (np.diff(inserted) == 1).all()
        assert kept <= chosen.thinking_budget
        if made.exit_reason != ExitReason.BUDGET:
            # The step that was kept ends right before a marker of the uninterrupted text.
            rest = byte_vocabulary.bytes_of(natural[kept:])
            dropped = text.removesuffix(DEFAULTS["closing"]).encode()
            assert rest.startswith(dropped) and rest[len(dropped) :].lstrip().startswith(b"Wait")
    assert len(made.probes) <= changes["max_probes"]
    assert sum(p.accepted for p in made.probes) == (made.exit_reason == ExitReason.CONFIDENT)
    if schedule == "speculative":
        blocking, _ = run(byte_vocabulary, policy, budget=budget, **{**changes, "schedule": "blocking"})
        assert blocking.token_ids.tolist() == made.token_ids.tolist() and blocking.probes == made.probes
        assert blocking.exit_reason == made.exit_reason and blocking.discarded_tokens <= made.discarded_tokens


# ---- many at once


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
    """One completion is held at its second request; all the others finish, with the very same tokens as without it,
    before it is let go. Driven by events, with a deadline for a hang."""
    policy = hashed_policy(byte_vocabulary, 3, 4)
    chosen = whole_settings(schedule=schedule, max_probes=4)

    async def free():
        engine = ScriptedEngine(byte_vocabulary, policy)
        return await early_exit.rollout(engine, prompts(4), chosen, byte_vocabulary.tokenizer, step=3)

    expected = asyncio.run(free())
    slow = next(f"3/{g.prompt.uid}/{c.index}" for g in expected for c in g.completions if c.probes and len(c) > 1)

    async def held():
        engine = ScriptedEngine(byte_vocabulary, policy)
        engine.gates[f"{slow}|2"] = engine.gates[f"{slow}|probe2"] = asyncio.Event()
        complete, done, rest = early_exit.complete, [], asyncio.Event()

        async def watched(engine, prompt, index, plan, seed, name):
            made = await complete(engine, prompt, index, plan, seed, name)
            done.append(name)
            if len(done) == 15:
                rest.set()
            return made

        early_exit.complete = watched
        try:
            task = asyncio.ensure_future(
                early_exit.rollout(engine, prompts(4), chosen, byte_vocabulary.tokenizer, step=3)
            )
            await asyncio.wait_for(rest.wait(), 60)
            assert slow not in done and not task.done()
            engine.gates[f"{slow}|2"].set()
            return await asyncio.wait_for(task, 60)
        finally:
            early_exit.complete = complete

    for one, other in zip(expected, asyncio.run(held()), strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist() and a.probes == b.probes


def test_exit_fraction_and_evaluation(byte_vocabulary):
    """Half of each group is generated plainly, with the seeds it would have had; evaluation is plain throughout and
    the same at every call. Seeds differ between completions, steps and prompts."""
    policy = hashed_policy(byte_vocabulary, 5, 4)

    def groups(kind, **changes):
        engine = ScriptedEngine(byte_vocabulary, policy)
        chosen = whole_settings(**changes)
        if kind == "evaluation":
            made = early_exit.evaluation(engine, prompts(3), chosen, byte_vocabulary.tokenizer)
        else:
            made = early_exit.rollout(engine, prompts(3), chosen, byte_vocabulary.tokenizer, kind)
        return asyncio.run(made), engine

    half, engine = groups(1, exit_fraction=0.5)
    for group in half:
        reasons = [c.exit_reason for c in group.completions]
        assert reasons[2:] == ["plain"] * 2 and "plain" not in reasons[:2]
    off, engine_off = groups(1, enabled=False)
    assert all(c.exit_reason == "plain" for g in off for c in g.completions)

    def first_seeds(engine):
        return {
            c.request_id.rpartition("|")[0]: c.sampling.seed for c in reversed(engine.calls) if not c.sampling.scratch
        }

    assert first_seeds(engine).keys() == first_seeds(engine_off).keys()
    assert len(set(first_seeds(engine_off).values())) == 12
    assert not set(first_seeds(engine_off).values()) & set(first_seeds(groups(2, enabled=False)[1]).values())
    for seed in (c.sampling.seed for c in engine.calls if c.sampling.offset == 0):
        assert seed in first_seeds(engine_off).values()
    evaluated, engine = groups("evaluation")
    assert all(c.exit_reason == "plain" for g in evaluated for c in g.completions)
    assert {c.sampling.temperature for c in engine.calls} == {0.6}
    again, _ = groups("evaluation")
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
                await early_exit.rollout(engine, prompts(4), whole_settings(), byte_vocabulary.tokenizer, 1)
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
        return await early_exit.rollout(engine, prompts(4), settings, words.tokenizer, 1)

    groups = asyncio.run(go(chosen))
    reasons = {c.exit_reason for g in groups for c in g.completions}
    assert ExitReason.CONFIDENT in reasons and len(reasons) > 1
    for group in groups:
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


# ---- settings and figures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markers": []}, "early_exit.markers: .* names no marker"),
        ({"markers": ["Wait", "  "]}, "early_exit.markers: .*cannot encode '  '; it has no text"),
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
        early_exit.check(rollout, words.tokenizer)
    assert "\n" not in str(caught.value)
    early_exit.check(config.Rollout(max_response_tokens=60, early_exit=config.EarlyExit(**good)), words.tokenizer)
    early_exit.check(rollout.model_copy(update={"early_exit": config.EarlyExit()}), words.tokenizer)  # off


def test_longest_sequence_covers_every_request(byte_vocabulary):
    """No request of a run with probes exceeds the bound the engine is built with."""
    chosen = whole_settings(near_budget=0)
    engine = ScriptedEngine(byte_vocabulary, hashed_policy(byte_vocabulary, 3, 8))
    asyncio.run(early_exit.rollout(engine, prompts(4), chosen, byte_vocabulary.tokenizer, 1))
    longest = max(len(c.token_ids) + c.sampling.max_tokens for c in engine.calls)
    slack = chosen.data.max_prompt_tokens - 2
    assert longest <= early_exit.longest_sequence(chosen) - slack
    assert early_exit.longest_sequence(whole_settings(enabled=False)) == 2048 + 60


def completion(reason: str, length: int, score: float = 0.0, probes: tuple = (), discarded: int = 0) -> Completion:
    zeros = np.zeros(length)
    return Completion(
        "p", 0, zeros.astype(np.int32), zeros.astype(np.uint8), zeros.astype(np.float32), "stop", [Span(1, 0, length)],
        reason, list(probes), discarded, score=score,
    )  # fmt: skip


def test_figures():
    """By hand: two groups; only the first has natural completions to compare its early ones with."""
    probes = (Probe(3, (1, 2), 0.55, False), Probe(9, (1, 2, 3), 0.97, True))
    groups = [
        Group(
            PROMPT, [completion("confident", 10, 1.0, probes, 4), completion("plain", 30), completion("think_end", 40)]
        ),
        Group(PROMPT, [completion("confident", 10, 0.0, probes[1:]), completion("budget", 60)]),
    ]
    figures = early_exit.summarise(groups)
    assert figures["early_exit_fraction"] == 0.4
    assert figures["exits/confident"] == 2 and figures["exits/budget"] == 1 and figures["exits/aborted"] == 0
    assert figures["probe_tokens"] == 8 and figures["discarded_tokens"] == 4 and figures["tokens_saved"] == 25
    assert figures["probes_per_completion"] == 0.6 and figures["exits_right"] == 0.5
    assert figures["probe_confidence/0.9"] == 2 and figures["probe_confidence/0.5"] == 1
    # one probe of .55 in a right completion; two of .97, one of them right
    assert figures["probe_calibration_error"] == pytest.approx((0.45 + 2 * 0.47) / 3)
    nothing = early_exit.summarise([])
    assert nothing.keys() == figures.keys() and not any(nothing.values())
