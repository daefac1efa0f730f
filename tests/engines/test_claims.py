"""One engine serves one run: a second is refused by name, a run that has left or was killed gives the engine back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from aiohttp import web

from megarl.config import Servers
from megarl.errors import RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Sampling
from megarl.rollout.in_engine.megarl_guard import LEASE, LEAVE, Gate, run_header
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.local.server import LocalServer
from megarl.rollout.servers.http import Endpoint, Refused, Run, ServerError, Taken, WrongKey
from megarl.rollout.servers.local import LocalServerEngine
from megarl.rollout.servers.pool import Pool
from megarl.rollout.weights.disk import DiskTransport
from tests.support.tiny_policy import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER)
A, B = Run("a1", "runs/a on node1"), Run("b2", "runs/ü b on node2")


def headers(run: Run | None = None, key: str = "") -> dict[str, list[bytes]]:
    made = {"x-megarl-run": [run_header(*run).encode()]} if run else {}
    return made | ({"authorization": [f"Bearer {key}".encode()]} if key else {})


def test_a_gate_serves_one_run_until_it_leaves_or_is_silent() -> None:
    """Whoever has no run may look, and asks for no claim. The refusal names the run and does not tell its id."""
    now = [0.0]
    gate = Gate("", clock=lambda: now[0])
    assert gate.refusal("POST", "/load", headers()) is None
    assert gate.refusal("POST", "/load", headers(A)) is None
    now[0] = LEASE - 1
    status, answer, told = gate.refusal("POST", "/load", headers(B))
    assert status == 409 and A.name in answer["error"] and A.id not in f"{answer}{told}"
    assert gate.refusal("POST", "/load", headers())[0] == 409
    assert gate.refusal("GET", "/v1/models", headers()) is None
    assert gate.refusal("GET", "/v1/models", headers(A)) is None
    now[0] += LEASE - 1
    assert gate.refusal("GET", "/v1/models", headers(B))[0] == 409
    now[0] += 2
    assert gate.refusal("GET", "/v1/models", headers(B)) is None
    assert gate.refusal("POST", LEAVE, headers(A))[0] == 409
    assert gate.refusal("POST", LEAVE, headers(B)) is None
    assert gate.refusal("POST", "/generate", headers(A)) is None


def test_without_the_key_a_run_gets_no_claim() -> None:
    gate = Gate("key")
    assert gate.refusal("POST", "/load", headers(B, "guess"))[0] == 401
    assert gate.refusal("POST", "/load", headers(A, "key")) is None


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_model(folder, dtype=torch.float32)
    return folder


@asynccontextmanager
async def serving(policy: Path, key: str = "") -> AsyncIterator[str]:
    engine = LocalEngine(policy, VOCABULARY, batch_slots=4, max_length=256)
    runner = web.AppRunner(LocalServer(engine, key).application(), shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "http://{}:{}".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


def pool(address: str, run: Run, policy: Path, folder: Path, key: str | None = None) -> Pool:
    servers = Servers(start_timeout=600.0, restarts=1)
    transport = DiskTransport(folder, policy, torch.float32)
    engine = LocalServerEngine(
        "engine", address, VOCABULARY, servers, vocab_size=len(TOKENIZER), transport=transport, api_key=key, run=run
    )
    return Pool([engine], transport, servers)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 100))


def weights(policy: Path, scale: float = 1.0) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return [(name, tensor * scale) for name, tensor in load_file(policy / "model.safetensors").items()]


def test_a_second_run_is_refused_by_name_and_the_first_goes_on(policy: Path, tmp_path: Path) -> None:
    """The second changes nothing: the first samples the same tokens under the same weights. Once it has left, the
    second one may have the engine."""

    async def test() -> None:
        async with serving(policy) as address:
            first = pool(address, A, policy, tmp_path / "a")
            await first.start()
            await first.update_weights(1, weights(policy))
            before = (await first.generate([5, 6], Sampling(8, seed=1), "1/0|0")).token_ids

            async def going() -> None:  # a run asks for health every few seconds
                while True:
                    await first.engines[0].health()
                    await asyncio.sleep(0.01)

            polling = asyncio.ensure_future(going())
            second = pool(address, B, policy, tmp_path / "b")
            with pytest.raises(Taken, match=f"serves another run, {A.name}"):
                await second.start()
            with pytest.raises(Taken, match=A.name):
                await second.members[0].engine.update_weights(1, weights(policy, 0.5))
            assert (await first.generate([5, 6], Sampling(8, seed=1), "1/0|1")).token_ids == before
            polling.cancel()
            await first.close()
            third = pool(address, B, policy, tmp_path / "c")
            await third.start()
            await third.close()

    run(test)


def test_weights_of_another_run_are_told_by_their_label(policy: Path, tmp_path: Path) -> None:
    """A server that admits both, as one that megarl's guard does not watch: the same count is not the same version."""

    async def test() -> None:
        async with serving(policy) as address:
            mine = pool(address, A, policy, tmp_path / "a")
            await mine.start()
            await mine.update_weights(1, weights(policy))
            loaded = {"version": "b2-1", "folder": str(policy)}
            same = Endpoint(address, run=A)
            await same.post("/load", loaded, timeout=60, purpose="load")
            await same.close()
            with pytest.raises(ServerError, match=r"answered with weights \['b2-1'\]; the current ones are 'a1-1'"):
                await mine.engines[0].generate([5, 6], Sampling(4), "x|0")
            await mine.close()

    run(test)


@pytest.mark.parametrize("used", ["guess", None])
def test_a_wrong_key_is_an_error_at_once(used: str | None, policy: Path, tmp_path: Path) -> None:
    """Not after `start_timeout`, which is 600 s here."""

    async def test() -> None:
        async with serving(policy, key="right") as address:
            begun = time.monotonic()
            with pytest.raises(WrongKey, match=r"HTTP 401: wrong or missing key; rollout\.servers\.api_key_env"):
                await pool(address, A, policy, tmp_path / "a", used).start()
            assert time.monotonic() - begun < 30

    run(test)


def test_a_key_that_becomes_wrong_gives_the_engine_up(policy: Path, tmp_path: Path) -> None:
    """A server that was started again with another key: named, and not tried again and again."""

    async def test() -> None:
        async with serving(policy) as address:
            mine = pool(address, A, policy, tmp_path / "a")
            await mine.start()
            await mine.update_weights(1, weights(policy))
            async with serving(policy, key="new") as other:
                mine.members[0].engine.endpoint.address = other
                with pytest.raises(RunError, match="wrong or missing key") as failed:
                    await mine.generate([5], Sampling(2), "x|0")
                assert isinstance(failed.value, Refused)
            await mine.close()

    run(test)
