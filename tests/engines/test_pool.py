"""The pool over scripted HTTP servers that fail in every way: exactly one result each, bounded waits, recovery."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

import pytest
import torch

from megarl.config import Servers
from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Sampling
from megarl.rollout.servers import pool as pool_module
from megarl.rollout.servers.http import Refused, Run
from megarl.rollout.servers.pool import Pool, group_of
from megarl.rollout.servers.remote import RemoteEngine
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.rollout.weights.transport import Outcome
from tests.support.fake_sglang import FakeSGLang
from tests.support.tiny_policy import make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
PROMPT = TOKENIZER.encode("Q: ")
ANSWER = TOKENIZER.encode("some answer")
SAMPLING = Sampling(max_tokens=len(ANSWER))
RUN = Run("run", "the test's")


class Labels:
    """A transport that only sets version labels, and remembers whom it served."""

    def __init__(self, *, resends: bool = True) -> None:
        self.resends = resends
        self.version = 0
        self.served: list[str] = []

    async def send(self, version: int, tensors: Iterable, engines: Sequence[RemoteEngine]) -> Outcome:
        list(tensors)
        self.version = version
        outcome = Outcome()
        for engine in engines:
            try:
                await self._give(engine)
            except RunError as e:
                outcome.failures[engine] = e
        return outcome

    async def resend(self, engine: RemoteEngine) -> bool:
        if self.resends:
            await self._give(engine)
        return self.resends

    async def close(self) -> None:
        pass

    async def _give(self, engine: RemoteEngine) -> None:
        assert isinstance(engine, SGLangEngine)
        await engine.end_update(self.version)
        self.served.append(engine.name)


def with_pool(
    n: int,
    body: Callable[[Pool, list[FakeSGLang], Labels], Awaitable[None]],
    *,
    resends: bool = True,
    tied: bool = False,
    **settings,
) -> None:
    """Run `body` with a pool over `n` servers, which all answer correctly at first."""

    async def main() -> None:
        servers = Servers(**{"attempt_timeout": 20.0, "request_timeout": 30.0, "start_timeout": 20.0, **settings})
        fakes = [FakeSGLang(TOKENIZER, PROMPT + ANSWER) for _ in range(n)]
        labels = Labels(resends=resends)
        for fake in fakes:
            await fake.listen(0)
        engines = [
            SGLangEngine(f"e{i}", fake.address, VOCABULARY, servers, vocab_size=len(TOKENIZER), run=RUN)
            for i, fake in enumerate(fakes)
        ]
        pool = Pool(engines, labels, servers, tied=tied)
        await pool.start()
        try:
            await body(pool, fakes, labels)
        finally:
            await pool.close()
            for fake in fakes:
                fake.go.set()
                await fake.vanish()

    asyncio.run(asyncio.wait_for(main(), 90))


async def ask(pool: Pool, *names: str) -> list[list[int]]:
    """The tokens of one request for each name."""
    generations = await asyncio.gather(*(pool.generate(PROMPT, SAMPLING, name) for name in names))
    return [generation.token_ids for generation in generations]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def rids(fake: FakeSGLang) -> set[str]:
    return {group_of(body["rid"].partition("~")[0]) for body in fake.requests}


def test_a_group_stays_where_its_prefix_is() -> None:
    """Proves affinity by the group of the request, and that groups spread over the engines."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        for fake in fakes:
            fake.mode = "slow"
        names = [f"g{g}/{i}|0" for g in range(4) for i in range(3)]
        task = asyncio.ensure_future(ask(pool, *names))
        await until(lambda: sum(fake.calls["generate"] for fake in fakes) == len(names))
        for fake in fakes:
            fake.mode = "right"
            fake.go.set()
        assert await task == [ANSWER] * len(names)
        await ask(pool, "g0/5|probe1", "g1/5|probe1")
        first, second = (rids(fake) for fake in fakes)
        assert not first & second and first | second == {"g0", "g1", "g2", "g3"} and len(first) == len(second)

    with_pool(2, body)


def test_requests_in_flight_are_bounded_and_idle_engines_help() -> None:
    """Proves the bound per engine, and that one group may use another engine that has nothing to do."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        for fake in fakes:
            fake.mode = "slow"
        task = asyncio.ensure_future(ask(pool, *(f"g/{i}|0" for i in range(10))))
        await until(lambda: all(fake.calls["generate"] == 2 for fake in fakes))
        for fake in fakes:
            fake.mode = "right"
            fake.go.set()
        assert await task == [ANSWER] * 10
        assert [fake.most_at_once for fake in fakes] == [2, 2]

    with_pool(2, body, concurrency=2)


@pytest.mark.parametrize("mode", ["error", "garbage", "not json", "wrong tokens", "never"])
def test_one_bad_engine_costs_no_result(mode: str) -> None:
    """Every request has exactly one result; the bad engine is taken out and, once right again, taken back."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        await pool.update_weights(1, [])
        fakes[0].mode = mode
        assert await ask(pool, *(f"g{i}/0|0" for i in range(20))) == [ANSWER] * 20
        assert pool.retries > 0
        fakes[0].mode = "right"
        await until(lambda: len(pool.engines) == 2)
        assert fakes[0].version == "run-1" and labels.served.count("e0") == 2

    with_pool(2, body, attempt_timeout=1.0)


def test_an_engine_that_vanishes_in_mid_request_is_replaced_and_comes_back_with_the_weights() -> None:
    """What `kill -9` looks like from here: connections reset, then refused."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        await pool.update_weights(5, [])
        fakes[0].mode = "slow"
        task = asyncio.ensure_future(ask(pool, *(f"g{i}/0|0" for i in range(12))))
        await until(lambda: fakes[0].calls["generate"] > 3)
        await fakes[0].vanish()
        assert await task == [ANSWER] * 12
        assert [engine.name for engine in pool.engines] == ["e1"]
        await fakes[0].come_back()
        await until(lambda: len(pool.engines) == 2)
        assert fakes[0].version == "run-5"

    with_pool(2, body)


def test_an_engine_without_the_weights_waits_for_the_next_update() -> None:
    """Proves that nothing is generated by a restarted engine until it has the current weights."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        await pool.update_weights(1, [])
        await fakes[0].vanish()
        await ask(pool, *(f"g{i}/0|0" for i in range(8)))
        await fakes[0].come_back()
        before = fakes[0].calls["generate"]
        await until(lambda: pool.members[0].state == "stale")
        await ask(pool, *(f"h{i}/0|0" for i in range(8)))
        assert fakes[0].calls["generate"] == before
        await pool.update_weights(2, [])
        assert len(pool.engines) == 2 and fakes[0].version == "run-2"

    with_pool(2, body, resends=False)


def test_running_servers_are_polled_in_every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those without weights and those given up: a server that nobody contacts ends (`megarl serve`)."""
    monkeypatch.setattr(pool_module, "HEALTH_PERIOD", 0.01)

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        for state in ("stale", "lost"):
            pool.members[0].state = state
            heard = fakes[0].calls["models"]
            await until(lambda heard=heard: fakes[0].calls["models"] > heard + 1)
            assert pool.members[0].state == state

    with_pool(2, body)


def test_an_engine_lost_during_an_update_is_left_out() -> None:
    """No deadlock and no error while another engine has the weights; an error when none has."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        await fakes[0].vanish()
        await pool.update_weights(1, [])
        assert [engine.name for engine in pool.engines] == ["e1"]
        await fakes[1].vanish()
        with pytest.raises(RunError, match="weights 2 reached no engine: e0 is lost.* e1 is lost"):
            await pool.update_weights(2, [])

    with_pool(2, body, restarts=1, start_timeout=0.2)


def test_the_last_engine_lost_is_an_error_for_those_who_wait() -> None:
    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        await fakes[0].vanish()
        with pytest.raises(RunError, match="no engine is left: e0 is lost"):
            await ask(pool, "g/0|0")

    with_pool(1, body, restarts=1, start_timeout=0.2)


def test_a_request_ends_by_its_deadline_and_names_the_last_cause() -> None:
    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        fakes[0].mode = "never"
        with pytest.raises(DeadlineExceeded, match=r"gave up after 0\.5 s waiting for 'g/0\|0'"):
            await ask(pool, "g/0|0")

    with_pool(1, body, request_timeout=0.5)


def test_a_slow_engine_gets_less_and_nothing_is_lost() -> None:
    """A slow answer within its deadline is no failure; the other engine takes what waits."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        fakes[0].mode = "slow"
        task = asyncio.ensure_future(ask(pool, *(f"g{i}/0|0" for i in range(40))))
        await until(lambda: fakes[1].calls["generate"] >= 36)
        assert not task.done() and fakes[0].calls["generate"] <= 4
        fakes[0].go.set()
        assert await task == [ANSWER] * 40 and pool.retries == 0

    with_pool(2, body, concurrency=4)


def test_a_request_that_is_wrong_is_not_repeated() -> None:
    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        for fake in fakes:
            fake.mode = "declines"
        with pytest.raises(Refused, match="too long"):
            await ask(pool, "g/0|0")
        assert sum(fake.calls["generate"] for fake in fakes) == 1

    with_pool(2, body)


def test_aborts_find_the_request() -> None:
    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        for fake in fakes:
            fake.mode = "slow"
        task = asyncio.ensure_future(pool.generate(PROMPT, SAMPLING, "g/0|0"))
        await until(lambda: sum(fake.calls["generate"] for fake in fakes) == 1)
        await pool.abort("g/0|0")
        assert (await task).finish == "abort"

    with_pool(2, body)


def test_engines_that_disagree_about_the_same_tokens_are_an_error() -> None:
    """The canary looks at every engine, not at whichever answers."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        assert await pool.score(PROMPT) == [-1.0 - 0.001 * token for token in PROMPT[1:]]
        original = pool.engines[1].score

        async def off(token_ids: Sequence[int]) -> list[float]:
            return [score - 0.2 for score in await original(token_ids)]

        pool.engines[1].score = off  # type: ignore[method-assign]
        with pytest.raises(RunError, match="e1 and e0 disagree by 0.2"):
            await pool.score(PROMPT)

    with_pool(2, body)


def test_a_wrong_tied_embedding_is_named() -> None:
    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        table = torch.arange(8.0).view(4, 2)
        await pool.update_weights(1, [("model.embed_tokens.weight", table), ("lm_head.weight", table.clone())])
        with pytest.raises(RunError, match="lm_head.weight differs from model.embed_tokens.weight"):
            await pool.update_weights(2, [("model.embed_tokens.weight", table), ("lm_head.weight", table + 1)])

    with_pool(1, body, tied=True)


def test_a_tensor_that_the_learner_leaves_out_is_named() -> None:
    """From the second send on; the first is held against the server's own digests, or the canary."""

    async def body(pool: Pool, fakes: list[FakeSGLang], labels: Labels) -> None:
        table = torch.arange(8.0).view(4, 2)
        await pool.update_weights(1, [("model.embed_tokens.weight", table), ("model.norm.weight", table)])
        with pytest.raises(RunError, match=r"weights 2: the learner did not send model\.norm\.weight"):
            await pool.update_weights(2, [("model.embed_tokens.weight", table)])

    with_pool(1, body)
