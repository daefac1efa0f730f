"""The embedded engine behind HTTP gives what it gives in the learner's process: tokens, stops, weights, aborts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file

from megarl.config import Servers
from megarl.errors import RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.local.server import LocalServer
from megarl.rollout.servers.http import Refused, ServerError
from megarl.rollout.servers.local import LocalServerEngine
from megarl.rollout.weights.disk import DiskTransport
from tests.support.tiny_policy import make_model, make_tokenizer, reference_logprobs

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
SAMPLINGS = [
    Sampling(max_tokens=40, seed=1),
    Sampling(max_tokens=40, seed=2, temperature=0.7, top_p=0.9, top_k=50),
    Sampling(max_tokens=120, seed=3, stop_words=("Wait",), stop_token_ids=(TOKENIZER.eos_token_id,)),
    Sampling(max_tokens=120, seed=4, stop_texts=("ing",), stop_sequences=((5, 6),)),
    Sampling(max_tokens=40, seed=5, min_logprob=-9.0),
]
PROMPTS = [TOKENIZER.encode(text) for text in ("Q: ", "Why?", "Wait", "Say it: ", "So: ")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("policy")
    return folder, make_model(folder, dtype=torch.float32)


def embedded(folder: Path) -> LocalEngine:
    return LocalEngine(folder, VOCABULARY, batch_slots=4, max_length=256)


@asynccontextmanager
async def served(folder: Path, run: Path, key: str = "", used: str | None = None) -> AsyncIterator[LocalServerEngine]:
    """A client of a server in this event loop. `used`: the key that the client has."""
    runner = web.AppRunner(LocalServer(embedded(folder), key).application(), shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    engine = LocalServerEngine(
        "served",
        f"http://{host}:{port}",
        VOCABULARY,
        Servers(start_timeout=1.0 if used else 60.0),  # a wrong key is waited for in vain
        vocab_size=len(TOKENIZER),
        transport=DiskTransport(run / "weights", folder, torch.float32),
        api_key=key if used is None else used,
    )
    try:
        yield engine
    finally:
        await engine.close()
        await runner.cleanup()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def generate_all(engine: LocalEngine | LocalServerEngine) -> Awaitable[list[Generation]]:
    pairs = zip(PROMPTS, SAMPLINGS, strict=True)
    return asyncio.gather(*(engine.generate(p, s, f"1/{i}/0|0") for i, (p, s) in enumerate(pairs)))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 250))


def test_tokens_stops_and_scores_are_the_embedded_engines(policy: tuple, tmp_path: Path) -> None:
    """Same seeds, same tokens, stops and stop positions; log-probs to rounding (the batch may differ); the canary is
    transformers'. Says nothing about the wire between real nodes: tests/slurm does."""
    folder, model = policy

    async def test() -> None:
        inside = embedded(folder)
        await inside.update_weights(3, tensors(folder).items())
        expected = await generate_all(inside)
        async with served(folder, tmp_path) as engine:
            await engine.start()
            await engine.update_weights(3, tensors(folder).items())
            made = await generate_all(engine)
            scores = await engine.score(PROMPTS[3])
        for got, wanted in zip(made, expected, strict=True):
            assert got.token_ids == wanted.token_ids
            assert (got.finish, got.matched_stop) == (wanted.finish, wanted.matched_stop)
            if not isinstance(wanted.matched_stop, int):
                assert got.stop_start == wanted.stop_start
            assert got.spans == wanted.spans
            assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
        assert {g.finish for g in made} == {"stop", "length", "abort"}
        assert scores == pytest.approx(reference_logprobs(model, PROMPTS[3]), abs=1e-4)

    run(test)


def test_continuations_draw_what_one_call_would_have(policy: tuple, tmp_path: Path) -> None:
    """30 tokens in one call, or in three with growing offsets."""

    async def test() -> None:
        async with served(policy[0], tmp_path) as engine:
            await engine.update_weights(0, tensors(policy[0]).items())
            whole = await engine.generate(PROMPTS[0], Sampling(max_tokens=30, seed=9), "a|0")
            parts: list[int] = []
            for i in range(3):
                sampling = Sampling(max_tokens=10, seed=9, offset=10 * i)
                parts += (await engine.generate([*PROMPTS[0], *parts], sampling, f"b|{i}")).token_ids
        assert parts == whole.token_ids

    run(test)


def test_weights_that_did_not_arrive_are_named(policy: tuple, tmp_path: Path) -> None:
    """A tensor whose checksum at the server differs fails the update, which names it."""

    async def test() -> None:
        async with served(policy[0], tmp_path) as engine:
            reported = engine.reported_digests

            async def corrupted() -> list[dict[str, int]]:
                (sums,) = await reported()
                return [{**sums, "model.norm.weight": sums["model.norm.weight"] + 1}]

            engine.reported_digests = corrupted  # type: ignore[method-assign]
            with pytest.raises(RunError, match=r"does not hold what was sent: model\.norm\.weight"):
                await engine.update_weights(1, tensors(policy[0]).items())

    run(test)


def test_abort_returns_what_there_is(policy: tuple, tmp_path: Path) -> None:
    async def test() -> None:
        async with served(policy[0], tmp_path) as engine:
            await engine.update_weights(0, tensors(policy[0]).items())
            task = asyncio.ensure_future(engine.generate(PROMPTS[0], Sampling(max_tokens=200), "c|0"))
            while not task.done():  # an abort that overtakes its request is without effect
                await engine.abort("c|0")
                await asyncio.sleep(0)
            made = task.result()
        assert made.finish == "abort"
        assert len(made.token_ids) < 200

    run(test)


def test_mistakes_and_failures_are_told_apart(policy: tuple, tmp_path: Path) -> None:
    """Without weights the engine fails (redone elsewhere); too long a request is refused, and so is a wrong key."""

    async def test() -> None:
        async with served(policy[0], tmp_path) as engine:
            await engine.start()  # healthy before its first weights
            with pytest.raises(ServerError, match="no weights yet"):
                await engine.generate(PROMPTS[0], Sampling(max_tokens=3), "d|0")
            await engine.update_weights(0, tensors(policy[0]).items())
            with pytest.raises(Refused, match="max_length"):
                await engine.generate(PROMPTS[0], Sampling(max_tokens=300), "d|1")
        async with served(policy[0], tmp_path, key="secret", used="guess") as engine:
            with pytest.raises(RunError, match="401"):
                await engine.start()

    run(test)
