"""An HTTP server that speaks SGLang's protocol and answers from a script, rightly or badly. Runs in the test's loop."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import Any

from aiohttp import web

ANSWERS = ("right", "garbage", "not json", "error", "never", "slow", "wrong tokens", "stale", "declines")


class FakeSGLang:
    """The token after n given tokens is `script[n]`: continuing draws what an uninterrupted generation would have.

    `mode` says how /generate answers from now on; "slow" waits for `go`.
    """

    def __init__(self, tokenizer: Any, script: list[int], mode: str = "right") -> None:
        self.tokenizer = tokenizer
        self.script = script
        self.mode = mode
        self.version = "default"
        self.go = asyncio.Event()
        self.calls: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.controls: list[tuple[str, dict[str, Any]]] = []
        self.info: dict[str, Any] = {"device": "fake", "tp_size": 1, "pp_size": 1}
        self.most_at_once = 0
        self.address = ""
        self._at_once = 0
        self._waiting: dict[str, asyncio.Event] = {}
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> FakeSGLang:
        await self.listen(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.go.set()
        await self.vanish()

    async def listen(self, port: int) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._info)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/{control}", self._control)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.address = f"http://127.0.0.1:{port}"

    async def vanish(self) -> None:
        """Close every connection, as a killed process does."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            for event in self._waiting.values():
                event.set()
            await runner.cleanup()

    async def come_back(self) -> None:
        """Listen at the same address again, with the weights that a started server has."""
        self.version, self.mode = "default", "right"
        await self.listen(int(self.address.rpartition(":")[2]))

    async def _models(self, request: web.Request) -> web.Response:
        self.calls["models"] += 1
        return web.json_response({"data": [{"id": "fake"}]})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(self.info)

    async def _control(self, request: web.Request) -> web.Response:
        name = request.match_info["control"]
        self.calls[name] += 1
        body = await request.json() if request.can_read_body else {}
        self.controls.append((name, body))
        self.version = body.get("weight_version") or body.get("new_version") or self.version
        return web.json_response({"success": True, "message": ""})

    async def _abort(self, request: web.Request) -> web.Response:
        self.calls["abort_request"] += 1
        body = await request.json()
        for rid, event in self._waiting.items():
            if body.get("abort_all") or rid == body.get("rid"):
                event.set()
        return web.Response()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("rid") == "first-token":  # the client's look at a server that starts
            return await self._answer(body)
        self.calls["generate"] += 1
        self.requests.append(body)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._answer(body)
        finally:
            self._at_once -= 1

    async def _answer(self, body: dict[str, Any]) -> web.StreamResponse:
        mode, aborted = self.mode, False
        if mode in ("slow", "never"):
            event = self._waiting[body["rid"]] = asyncio.Event()
            waits = [asyncio.ensure_future(event.wait())]
            if mode == "slow":
                waits.append(asyncio.ensure_future(self.go.wait()))
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            aborted = event.is_set()
        if mode == "error":
            return web.Response(status=500, text="out of memory")
        if mode == "declines":
            return web.json_response({"error": {"message": "too long"}}, status=400)
        if mode == "not json":
            return web.Response(text="<html>gateway</html>")
        if mode == "garbage":
            return web.json_response({"answer": 42})
        given = body["input_ids"]
        made, finish = ([], "abort") if aborted else self._continue(given, body["sampling_params"])
        rows = [[-1.0 - 0.001 * token, token, None] for token in made]
        if mode == "wrong tokens":
            rows = [[-1.0, token + 1, None] for token in made]
        version = "7" if mode == "stale" else self.version
        meta = {"finish_reason": {"type": finish}, "output_token_logprobs": rows, "weight_version": version}
        if body.get("logprob_start_len") == 0:
            last = len(self.tokenizer) - 1  # the real server reports 0 in its place
            meta["input_token_logprobs"] = [
                [-1.0 - 0.001 * token, 0 if token == last else token, None] for token in given
            ]
        return web.json_response({"text": "", "output_ids": made, "meta_info": meta})

    def _continue(self, given: list[int], parameters: dict[str, Any]) -> tuple[list[int], str]:
        made: list[int] = []
        for token in self.script[len(given) :]:
            if len(made) == parameters["max_new_tokens"]:
                return made, "length"
            made.append(token)
            text = self.tokenizer.decode(made)
            if any(re.search(pattern, text) for pattern in parameters.get("stop_regex") or ()):
                return made, "stop"
            if any(stop in text for stop in parameters.get("stop") or ()):
                return made, "stop"
            if token in (parameters.get("stop_token_ids") or ()):
                return made, "stop"
        return made, "length"
