"""The SGLang client against a scripted HTTP server: stops, resumption, aborts, versions, bad answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megarl.config import Servers
from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.servers.http import Refused, Run, ServerError
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.types import Span
from tests.support.fake_sglang import FakeSGLang
from tests.support.tiny_policy import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
PROMPT = "Q: "


def with_fake(text: str, body: Callable[[FakeSGLang, SGLangEngine, list[int]], Awaitable[None]], **settings) -> None:
    """Run `body` with a server whose policy continues PROMPT by `text`."""

    async def main() -> None:
        prompt = TOKENIZER.encode(PROMPT)
        async with FakeSGLang(TOKENIZER, prompt + TOKENIZER.encode(text)) as fake:
            servers = Servers(**{"attempt_timeout": 20.0, **settings})
            run = Run("run", "the test's")
            engine = SGLangEngine("fake", fake.address, VOCABULARY, servers, vocab_size=len(TOKENIZER), run=run)
            await engine.start()
            try:
                await body(fake, engine, prompt)
            finally:
                await engine.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def generate(text: str, **sampling) -> tuple[Generation, int]:
    """The generation for a policy that says `text`, and how many requests it took."""
    results: list[tuple[Generation, int]] = []

    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        result = await engine.generate(prompt, Sampling(**{"max_tokens": 200, **sampling}), "a")
        results.append((result, fake.calls["generate"]))

    with_fake(text, body)
    return results[0]


async def begun(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> asyncio.Task[Generation]:
    """A request "a" for five tokens, which the server has and does not answer before `fake.go`."""
    fake.mode = "slow"
    task = asyncio.ensure_future(engine.generate(prompt, Sampling(max_tokens=5), "a"))
    while not fake.calls["generate"]:
        await asyncio.sleep(0)
    return task


def said(generation: Generation) -> str:
    return TOKENIZER.decode(generation.token_ids)


def test_a_stand_alone_word_stops_with_its_confirming_token_in_one_request() -> None:
    """Proves that the pattern sent includes the confirmation, and that tokens and log-probs stay aligned."""
    generation, requests = generate("ab Wait, then more", stop_words=("Wait",))
    assert (said(generation), generation.matched_stop, requests) == ("ab Wait,", "Wait", 1)
    assert generation.finish == "stop"
    assert TOKENIZER.decode(generation.token_ids[generation.stop_start :]).lstrip().startswith("Wait")
    assert generation.logprobs == [-1.0 - 0.001 * token for token in generation.token_ids]
    assert generation.spans == [Span(0, 0, len(generation.token_ids))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Waiting is no stop. Wait! rest", "Waiting is no stop. Wait!"),  # a longer word
        ("noWait either, Wait rest", "noWait either, Wait "),  # a letter before: the server cannot see that, we do
        ("é Wait\u00e9 rest", "é Wait\ufffd"),  # confirmed by half a character
        ("Wait", "Wait"),  # the text ends there: nothing confirms
    ],
)
def test_words_are_judged_by_the_client(text: str, expected: str) -> None:
    """Proves resumption after a stop that is none; the result is what one uninterrupted generation would be."""
    generation, _ = generate(text, max_tokens=len(TOKENIZER.encode(text)), stop_words=("Wait",))
    assert said(generation) == expected


def test_a_word_begun_in_the_given_response_is_completed() -> None:
    """Proves that `offset` tokens of context belong to the response: the stop begins before the first new token."""

    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        response = TOKENIZER.encode("a Wait")
        sampling = Sampling(max_tokens=5, offset=len(response), stop_words=("Wait",))
        generation = await engine.generate(prompt + response, sampling, "a")
        assert (said(generation), generation.matched_stop, generation.stop_start) == ("!", "Wait", -1)

    with_fake("a Wait! rest", body)


def test_a_sequence_of_tokens_stops() -> None:
    sequence = tuple(TOKENIZER.encode("</t>"))
    assert len(sequence) > 1
    generation, _ = generate("think</t>answer", stop_sequences=(sequence,))
    assert (said(generation), generation.matched_stop) == ("think</t>", sequence)


def test_the_models_own_end_is_no_stop_unless_asked_for() -> None:
    """Proves that a pause of the server at a token which is no stop of the request only resumes."""
    end = TOKENIZER.eos_token_id
    generation, _ = generate("a<|end|>b", max_tokens=3, stop_token_ids=(TOKENIZER.pad_token_id,))
    assert (said(generation), generation.finish) == ("a<|end|>b", "length")
    generation, _ = generate("a<|end|>b", stop_token_ids=(end,))
    assert (said(generation), generation.matched_stop) == ("a<|end|>", end)


def test_the_budget_holds_over_resumptions() -> None:
    """Four pauses that are no stops: exactly `max_tokens` in the end, as if there had been none."""
    text = "noWait noWait noWait noWait and so on"
    generation, requests = generate(text, max_tokens=20, stop_words=("Wait",))
    assert len(generation.token_ids) == 20 and generation.finish == "length" and requests > 1
    assert generation.token_ids == TOKENIZER.encode(text)[:20]


def test_an_abort_returns_what_there_is() -> None:
    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        task = await begun(fake, engine, prompt)
        await engine.abort("a")
        assert (await task).finish == "abort"
        await engine.abort("a")  # finished ids are ignored
        await engine.abort("never heard of")

    with_fake("hello", body)


def test_a_request_is_carried_over_a_weight_update_and_each_span_has_its_version() -> None:
    """Proves partial rollouts: cut short, resumed under the new weights, nothing lost or doubled."""

    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        engine.version, fake.version = 1, "run-1"
        text = TOKENIZER.encode("noWait and then")
        sampling = Sampling(max_tokens=len(text), stop_words=("Wait",))
        first = len(TOKENIZER.encode("noWait "))

        original = engine.segment

        async def segment(*arguments):  # the server turns slow after its first pause
            result = await original(*arguments)
            fake.mode = "slow"
            return result

        engine.segment = segment  # type: ignore[method-assign]
        task = asyncio.ensure_future(engine.generate(prompt, sampling, "a"))
        while fake.calls["generate"] < 2:
            await asyncio.sleep(0)
        async with engine.pause():
            assert not engine.in_flight
            fake.mode, engine.version, fake.version = "right", 2, "run-2"
        fake.go.set()
        generation = await task
        assert generation.token_ids == text
        assert generation.spans == [Span(1, 0, first), Span(2, first, len(text))]

    with_fake("noWait and then", body)


def test_requests_may_end_while_they_are_cut_short() -> None:
    """The last one is done before the server has answered that it was told to stop: there is nothing to wait for."""

    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        task = await begun(fake, engine, prompt)
        original = engine.abort_all

        async def abort_all() -> None:
            await original()
            fake.go.set()
            while engine.in_flight:
                await asyncio.sleep(0)

        engine.abort_all = abort_all  # type: ignore[method-assign]
        async with engine.pause():
            assert not engine.in_flight
        assert said(await task) == "hello"

    with_fake("hello", body)


@pytest.mark.parametrize(
    ("mode", "error", "says"),
    [
        ("garbage", ServerError, "without 'output_ids'"),
        ("not json", ServerError, "not JSON"),
        ("error", ServerError, "HTTP 500: out of memory"),
        ("wrong tokens", ServerError, "does not add up"),
        ("stale", ServerError, "weights ['7']; the current ones are 'run-3'"),
        ("declines", Refused, "too long"),
        ("never", DeadlineExceeded, "waiting for fake to answer 'a~0'"),
    ],
)
def test_bad_answers_are_errors_that_name_the_server(mode: str, error: type[RunError], says: str) -> None:
    """Each bounded: by the answer itself or by `attempt_timeout`."""

    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        fake.mode, engine.version, fake.version = mode, 3, "run-3"
        with pytest.raises(error) as caught:
            await engine.generate(prompt, Sampling(max_tokens=5), "a")
        assert says in str(caught.value)
        if mode == "never":  # the server is told that nobody waits any more
            while not fake.calls["abort_request"]:
                await asyncio.sleep(0)

    with_fake("hello", body, attempt_timeout=0.3)


def test_a_token_that_the_model_lacks_never_reaches_the_server() -> None:
    """An SGLang server dies of one."""

    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        with pytest.raises(RunError, match=f"token id {len(TOKENIZER)} is outside"):
            await engine.generate([*prompt, len(TOKENIZER)], Sampling(max_tokens=1), "a")
        assert not fake.calls["generate"]

    with_fake("hello", body)


def test_scores() -> None:
    """Also of the vocabulary's last token, which the server reports as 0."""

    async def body(fake: FakeSGLang, engine: SGLangEngine, prompt: list[int]) -> None:
        prompt = [*prompt, len(TOKENIZER) - 1, *prompt]
        assert await engine.score(prompt) == [-1.0 - 0.001 * token for token in prompt[1:]]

    with_fake("hello", body)


def test_a_server_that_reports_no_experts_is_told_on() -> None:
    """One that somebody else started without the flag for them."""
    with pytest.raises(ServerError, match="no experts; start the server with --enable-return-routed-experts"):
        generate("abc", experts=True)
