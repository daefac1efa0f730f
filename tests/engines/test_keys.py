"""The API key of servers that megarl starts: on no command line, asked for on every path, hidden in logs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import UserError
from megarl.rollout.in_engine.megarl_guard import Guard
from megarl.rollout.in_engine.megarl_sglang import hide_in_logs
from megarl.rollout.servers import factory
from megarl.rollout.servers.http import Endpoint
from tests.support.real_servers import Policy, settings
from tests.support.server_processes import check_the_key
from tests.support.tiny_policy import make_model


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return Policy(tmp_path / "policy", make_model(tmp_path / "policy"))


@pytest.mark.parametrize("engine", ["sglang", "vllm", "local"])
def test_the_key_is_in_the_environment_alone(engine: str, policy: Policy, api_key: str, tmp_path: Path) -> None:
    """And a server without one does not take the key that happens to be in the trainer's environment."""
    server = factory.server(settings(policy, tmp_path / "run", engine), 0, engine, api_key)
    assert api_key in server.environment.values()
    assert not any(api_key in part for part in server.command(1))
    keyless = factory.server(settings(policy, tmp_path / "run", engine, api_key_env=None), 0, engine, None)
    assert {name: value for name, value in keyless.environment.items() if "KEY" in name} == {
        name: "" for name, value in server.environment.items() if value == api_key
    }


@pytest.mark.parametrize("flags", [["--api-key", "abc"], ["--api-key=abc"]])
def test_a_key_among_the_flags_is_refused(flags: list[str], policy: Policy, tmp_path: Path) -> None:
    wanted = settings(policy, tmp_path / "run", "local", flags=flags)
    with pytest.raises(UserError, match=r"rollout\.servers\.flags: '--api-key': .* rollout\.servers\.api_key_env"):
        factory.check(wanted.rollout)


@pytest.mark.slow
def test_the_embedded_engines_server_keeps_its_key(policy: Policy, api_key: str, tmp_path: Path) -> None:
    """The same as tests/engines/test_real_engines.py shows of SGLang and vLLM, of `megarl serve`'s own."""

    async def main() -> None:
        server = factory.server(settings(policy, tmp_path / "run", "local"), 0, "local-0", api_key)
        server.start()
        endpoint = Endpoint(server.address, api_key=api_key)
        try:
            await server.wait_until(lambda: endpoint.get("/v1/models", timeout=5, purpose="health"), 120)
            await check_the_key(server, api_key, "/generate", "/score", "/load", "/abort", "/no-such-path")
        finally:
            await endpoint.close()
            await asyncio.to_thread(server.stop)

    asyncio.run(main())


@pytest.fixture
def log_factory() -> Iterator[None]:
    before = logging.getLogRecordFactory()
    yield
    logging.setLogRecordFactory(before)


def test_log_records_do_not_show_what_is_hidden(log_factory: None, caplog: pytest.LogCaptureFixture) -> None:
    """In the message, in an argument, in an argument's representation, in a record that cannot be formatted."""
    hide_in_logs("s3cret")
    log = logging.getLogger("test")
    log.warning("key s3cret")
    log.warning("%s and %s", "s3cret", 1)
    log.warning("settings: %s", {"key": "s3cret"})
    log.warning("too many", "s3cret")
    log.warning("%d of %s", 1, "something else")
    assert caplog.messages == [
        "key ***",
        "*** and 1",
        "settings: {'key': '***'}",
        "too many ('***',)",
        "1 of something else",
    ]


@pytest.mark.parametrize("key", ["right", ""])
def test_the_guard_asks_for_the_key_on_every_path(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's middleware as ASGI, in front of an application that answers all: refused before it is reached, `/health`
    apart; open where there is no key."""
    monkeypatch.setenv("VLLM_API_KEY", key)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "reached"})

    async def ask(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": kind, "path": path, "headers": list(headers)}
        await Guard(answer)(scope, None, send)  # type: ignore[arg-type]
        return sent

    def reached(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> bool:
        sent = asyncio.run(ask(path, *headers, kind=kind))
        assert sent[0]["type"] == "reached" or sent[0].get("status", 401) == 401
        return sent[0]["type"] == "reached"

    right, wrong = (b"authorization", b"Bearer right"), (b"authorization", b"Bearer wrong")
    for path in ("/collective_rpc", "/v1/models", "/pause", "/health/../pause", "//health"):
        assert reached(path) == reached(path, wrong) == reached(path, wrong, right) == (not key)
        assert reached(path, right)
    assert reached("/health") and reached("/", kind="lifespan")
    assert reached("/v1/realtime", kind="websocket") == (not key)
