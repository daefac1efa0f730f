"""Early exit of one completion, branch by branch, on an engine whose tokens are chosen; then at random."""

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.early_exit import thinker
from megarl.rollout.early_exit.plan import ExitReason
from megarl.types import Origin
from tests.support.exit_scripts import (
    CLOSE,
    CONFIDENT,
    DEFAULTS,
    DOUBTFUL,
    EOS,
    PROMPT,
    SCHEDULES,
    THOUGHT,
    Script,
    check_exact,
    hashed_policy,
    plan,
    run,
)
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_rollout import byte_level_tokenizer


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


@pytest.mark.parametrize(
    ("changes", "tokens", "confidence"),
    [
        ({"probe_tokens": 20}, 3, 0.5),  # .5 twice is less than .95 nineteen times: .377
        ({"probe_tokens": 14}, 2, 0.5),  # .5 is less than .95 thirteen times: .513
        ({"probe_tokens": 14, "reject_early": False}, 4, 0.5),
        ({"probe_tokens": 14, "averaging": "arithmetic"}, 4, 0.5),
    ],
)
def test_a_trial_without_hope_is_refused_early(byte_vocabulary, changes, tokens, confidence):
    """It ends once no rest could lift it over the threshold, and is recorded with the confidence of what it had."""
    script = Script(byte_vocabulary, THOUGHT, [DOUBTFUL, CONFIDENT], "2" + EOS)
    made, _ = run(byte_vocabulary, script, **changes)
    assert [p.accepted for p in made.probes] == [False, True]
    assert len(made.probes[0].token_ids) == tokens and made.probes[0].confidence == pytest.approx(confidence)
    assert byte_vocabulary.text(made.probes[1].token_ids) == "{2}</think>"


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
    made = asyncio.run(thinker.complete(engine, PROMPT, 0, plan(byte_vocabulary), 7, "n"))
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
    whole, _ = run(byte_vocabulary, policy, budget=budget, **changes, reject_early=False)
    assert whole.token_ids.tolist() == made.token_ids.tolist() and whole.exit_reason == made.exit_reason
    for refused, full in zip(made.probes, whole.probes, strict=True):
        assert (refused.position, refused.accepted) == (full.position, full.accepted)
        assert refused.token_ids == full.token_ids[: len(refused.token_ids)]
        assert refused == full or refused.confidence <= changes["threshold"]
    if schedule == "speculative":
        blocking, _ = run(byte_vocabulary, policy, budget=budget, **{**changes, "schedule": "blocking"})
        assert blocking.token_ids.tolist() == made.token_ids.tolist() and blocking.probes == made.probes
        assert blocking.exit_reason == made.exit_reason and blocking.discarded_tokens <= made.discarded_tokens
