"""Engines that die amid a weight sync or come back after it: restarts are used, weights are checked as at a send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file, save_file

from megarl.config import Servers
from megarl.errors import RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Sampling
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.local.server import LocalServer
from megarl.rollout.servers.http import Run, ServerError
from megarl.rollout.servers.local import LocalServerEngine
from megarl.rollout.servers.pool import Pool
from megarl.rollout.servers.remote import RemoteEngine
from megarl.rollout.weights.disk import DiskTransport
from megarl.rollout.weights.transport import Broken, NotAsSent, NotDelivered, Outcome
from tests.support.tiny_policy import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
CANARY = list(range(40, 60))
Named = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_model(folder, dtype=torch.float32)
    return folder


def weights(policy: Path) -> Named:
    return list(load_file(policy / "model.safetensors").items())


class Node:
    """A server at one address, which can die and be started again without weights."""

    def __init__(self, policy: Path) -> None:
        self.policy, self.port = policy, 0
        self.runner: web.AppRunner | None = None
        self.dies_at = ""  # the path at whose next request it dies

    async def start(self) -> None:
        engine = LocalEngine(self.policy, VOCABULARY, batch_slots=4, max_length=256)
        application = LocalServer(engine).application()
        application.middlewares.append(self._deadly)
        self.runner = web.AppRunner(application, shutdown_timeout=0)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def die(self) -> None:
        if self.runner is not None:
            runner, self.runner = self.runner, None
            await runner.cleanup()

    @web.middleware
    async def _deadly(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == self.dies_at:
            self.dies_at = ""
            assert request.transport is not None
            request.transport.abort()
            self.reborn = asyncio.ensure_future(self.die_and_come_back())
        return await handler(request)

    async def die_and_come_back(self) -> None:
        await self.die()
        await self.start()


@asynccontextmanager
async def nodes(
    policy: Path, folder: Path, count: int, transport: Any = None
) -> AsyncIterator[tuple[Pool, list[Node]]]:
    made = [Node(policy) for _ in range(count)]
    for node in made:
        await node.start()
    limits = Servers(start_timeout=20.0, restarts=2, attempt_timeout=20.0, request_timeout=60.0)
    transport = transport or DiskTransport(folder, policy, torch.float32)
    run = Run.new("a run")
    engines = [
        LocalServerEngine(
            f"e{i}", f"http://127.0.0.1:{n.port}", VOCABULARY, limits, vocab_size=len(TOKENIZER),
            transport=transport, run=run,
        )
        for i, n in enumerate(made)
    ]  # fmt: skip
    pool = Pool(engines, transport, limits)
    await pool.start()
    try:
        yield pool, made
    finally:
        await pool.close()
        for node in made:
            await node.die()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def flip(file: Path) -> None:
    """One bit, in the middle of the tensors."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


def leave_out(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a bit": flip,
    "a tensor": leave_out,
    "no file": Path.unlink,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_does_not_reach_an_engine_that_came_back(damage: str, policy: Path, tmp_path: Path) -> None:
    """The run ends, and names the folder and what is wrong: nothing is sampled from such weights."""

    async def test() -> None:
        async with nodes(policy, tmp_path, 1) as (pool, (node,)):
            await pool.update_weights(1, weights(policy))
            await node.die()
            (file,) = (tmp_path / "weights-1").glob("*.safetensors")
            DAMAGES[damage](file)
            await node.start()
            with pytest.raises(RunError, match=r"no engine is left: e0 is lost: weights 1: .*weights-1") as failed:
                await pool.generate([5, 6], Sampling(4), "1/0|0")
        told = {"a bit": "does not have what was sent: model", "a tensor": "norm.* is missing"}.get(damage, "read back")
        assert failed.match(told)

    run(test)


def test_an_engine_that_comes_back_samples_as_before(policy: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(policy, tmp_path, 1) as (pool, (node,)):
            await pool.update_weights(1, weights(policy))
            await pool.score(CANARY)
            before = await pool.generate([5, 6], Sampling(8, seed=1), "1/0|0")
            await node.die()
            await node.start()
            assert (await pool.generate([5, 6], Sampling(8, seed=1), "1/0|0")).token_ids == before.token_ids
            assert pool.retries > 0

    run(test)


def test_an_engine_that_comes_back_is_held_against_digests_and_canary(policy: Path, tmp_path: Path) -> None:
    """It reports another checksum than the folder has, or scores the canary otherwise than the engines did."""

    async def comes_back(name: str, wrong: Callable[[Any], Any], told: str) -> None:
        async with nodes(policy, tmp_path / name, 1) as (pool, (node,)):
            await pool.update_weights(1, weights(policy))
            await pool.score(CANARY)
            engine = pool.engines[0]
            right = getattr(engine, name)

            async def other(*arguments: Any) -> Any:
                return wrong(await right(*arguments))

            setattr(engine, name, other)
            await node.die()
            await node.start()
            with pytest.raises(RunError, match=told):
                await pool.generate([5, 6], Sampling(4), "1/0|0")

    async def test() -> None:
        name = "model.norm.weight"
        told = rf"e0 is lost: weights 1: e0 does not hold what was sent: {name}"
        await comes_back("reported_digests", lambda sums: [{**sums[0], name: 1}], told)
        told = "e0 is lost: e0 and the engines before it disagree by 0.2"
        await comes_back("score", lambda scores: [score - 0.2 for score in scores], told)

    run(test)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("path", ["/load", "/score"])
def test_a_death_amid_a_sync_costs_a_restart(path: str, count: int, policy: Path, tmp_path: Path) -> None:
    """While the weights are loaded, or the canary is scored; of the only engine, or of one of two."""

    async def test() -> None:
        async with nodes(policy, tmp_path, count) as (pool, made):
            await pool.update_weights(1, weights(policy))
            expected = await pool.score(CANARY)
            made[0].dies_at = path
            await pool.update_weights(2, weights(policy))
            assert await pool.score(CANARY) == pytest.approx(expected, abs=1e-5)
            assert (await pool.generate([5, 6], Sampling(4), "1/0|0")).spans[0].version == 2
            assert pool.members[0].restarts == 1

    run(test)


def test_a_death_amid_a_sync_without_restarts_left_is_an_error(policy: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with nodes(policy, tmp_path, 1) as (pool, (node,)):
            await pool.update_weights(1, weights(policy))
            pool.members[0].restarts = 2
            node.dies_at = "/load"
            with pytest.raises(RunError, match="weights 2 reached no engine: e0 is lost: weights 2"):
                await pool.update_weights(2, weights(policy))

    run(test)


class Once:
    """A transport that keeps nothing for engines that come back, as buckets do. `breaks`: it fails for all of them."""

    def __init__(self, folder: Path, breaks: bool) -> None:
        self.folder, self.breaks = folder, breaks
        self.sends = 0

    async def send(self, version: int, tensors: Iterable, engines: Sequence[RemoteEngine]) -> Outcome:
        self.sends += 1
        list(tensors)
        outcome = Outcome()
        for engine in engines:
            try:
                await engine.load_folder(version, self.folder)
            except ServerError as e:
                if self.breaks:
                    raise Broken(f"weights {version}: the broadcast failed: {e}") from e
                outcome.failures[engine] = e
        return outcome

    async def resend(self, engine: RemoteEngine) -> bool:
        return False

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_engines_that_nobody_can_give_the_weights_ask_for_another_send(
    count: int, breaks: bool, policy: Path, tmp_path: Path
) -> None:
    """With one left that has them, no second send is needed, unless the first one broke for all."""

    async def test() -> None:
        transport = Once(policy, breaks)
        async with nodes(policy, tmp_path, count, transport) as (pool, made):
            await pool.update_weights(1, weights(policy))
            made[0].dies_at = "/load"
            if breaks or count == 1:
                with pytest.raises(NotDelivered):
                    await pool.update_weights(2, weights(policy))
            await pool.update_weights(2, weights(policy))
            assert (await pool.generate([5, 6], Sampling(4), "1/0|0")).spans[0].version == 2

    run(test)


def test_a_failed_send_of_engines_that_live_is_an_error(policy: Path, tmp_path: Path) -> None:
    """Also weights that arrived otherwise than they were sent: no restart is used on that."""

    async def test() -> None:
        async with nodes(policy, tmp_path, 1) as (pool, _):
            for failure in (RunError("a tensor is missing"), NotAsSent("weights 1: other")):

                async def send(*_: Any, failure: RunError = failure) -> Outcome:
                    raise failure

                pool.transport.send = send  # type: ignore[method-assign]
                with pytest.raises(type(failure), match=str(failure)):
                    await pool.update_weights(1, weights(policy))
            assert pool.members[0].restarts == 0

    run(test)


def test_closing_has_a_deadline(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megarl.rollout.servers import pool as pool_module

    async def test() -> None:
        async with nodes(policy, tmp_path, 1) as (pool, _):

            async def hangs() -> None:
                await asyncio.Event().wait()

            with monkeypatch.context() as patch:
                patch.setattr(pool_module, "CLOSE_TIMEOUT", 0.2)
                patch.setattr(pool.transport, "close", hangs)
                with pytest.raises(RunError, match=r"gave up after 0\.2 s waiting for the engines to end"):
                    await pool.close()

    run(test)
