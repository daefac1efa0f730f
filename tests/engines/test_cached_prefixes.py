"""New weights leave no prefix of the old ones in a server's cache, though it may refuse to drop them at first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from megarl.config import Servers
from megarl.errors import DeadlineExceeded
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.servers import vllm
from megarl.rollout.servers.http import Refused
from megarl.rollout.servers.remote import RemoteEngine
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.rollout.servers.vllm import VLLMEngine
from tests.support.tiny_policy import make_tokenizer

TOKENIZER = make_tokenizer()


def load(kind: type[RemoteEngine], answers: list[web.Response], path: str) -> list[str]:
    """Load a folder into a server that answers requests at `path` with `answers`, the last of them for ever; returns
    the queries that it got there."""
    asked: list[str] = []

    async def drop(request: web.Request) -> web.Response:
        asked.append(request.query_string)
        answer = answers[min(len(asked), len(answers)) - 1]
        return web.Response(status=answer.status, body=answer.body, content_type="application/json")

    async def other(_: web.Request) -> web.Response:
        return web.json_response({"success": True, "results": []})

    async def main() -> None:
        application = web.Application()
        application.router.add_post(path, drop)
        application.router.add_post("/{path:.*}", other)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        engine = kind("toy", f"http://{host}:{port}", Vocabulary(TOKENIZER), Servers(), vocab_size=len(TOKENIZER))
        try:
            await engine.load_folder(7, Path("weights"))
            assert engine.version == 7
        finally:
            await engine.close()
            await runner.cleanup()

    asyncio.run(asyncio.wait_for(main(), 60))
    return asked


def test_vllm_is_asked_until_it_has_dropped_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers 200 with `success: false` while a request that was cut still holds blocks."""
    refused, done = web.json_response({"success": False}), web.json_response({"success": True})
    assert len(load(VLLMEngine, [refused, refused, done], "/reset_prefix_cache")) == 3
    monkeypatch.setattr(vllm, "CONTROL_TIMEOUT", 0.3)
    with pytest.raises(DeadlineExceeded, match="drop cached prefixes"):
        load(VLLMEngine, [refused], "/reset_prefix_cache")


def test_sglang_waits_until_it_is_idle() -> None:
    """It is told how long to wait for its scheduler; what it says after that is final."""
    (query,) = load(SGLangEngine, [web.Response(text="Cache flushed.")], "/flush_cache")
    assert query == "timeout=60"
    with pytest.raises(Refused, match="idle state"):
        load(SGLangEngine, [web.Response(status=400, text="Timed out waiting for idle state.")], "/flush_cache")
