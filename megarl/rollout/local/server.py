"""The embedded engine as a server, so that it may run on another node than the learner.

    python -m megarl.rollout.local.server --model FOLDER --port 30000     what `megarl serve` starts for engine: local

Token ids in, token ids out, as JSON. The client is rollout/servers/local.py. There are no weights until the first
`/load`. If the variable MEGARL_ENGINE_KEY contains a key, every request must present it.
"""

from __future__ import annotations

import argparse
import hmac
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from safetensors import safe_open

from megarl.errors import RunError, UserError
from megarl.models.tokenizer import load_tokenizer
from megarl.rollout.engine import Sampling
from megarl.rollout.in_engine.megarl_sglang import KEY_VARIABLE
from megarl.rollout.local.engine import LocalEngine

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LocalServer:
    """Routes of one `LocalEngine`. Refuses requests with a wrong key, unless `api_key` is empty."""

    def __init__(self, engine: LocalEngine, api_key: str = "") -> None:
        self._engine = engine
        self._key = f"Bearer {api_key}" if api_key else ""
        self._loaded = False
        self._running: set[str] = set()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30, middlewares=[self._guard])
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/score", self._score)
        app.router.add_post("/abort", self._abort)
        app.router.add_post("/load", self._load)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, and turn errors into HTTP: 4xx for a bad request, 5xx for a failure of the engine."""
        if self._key and not hmac.compare_digest(self._key, request.headers.get("Authorization", "")):
            return web.json_response({"error": "wrong api key"}, status=401)
        try:
            return await handler(request)
        except (UserError, KeyError, TypeError, ValueError) as e:
            return web.json_response({"error": f"{type(e).__name__}: {e}"}, status=400)
        except RunError as e:
            return web.json_response({"error": str(e)}, status=500)

    async def _models(self, request: web.Request) -> web.Response:
        if self._loaded:
            await self._engine.health()
        return web.json_response({"data": [{"id": "policy"}]})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._running.add(body["id"])
        try:
            made = await self._engine.generate(body["token_ids"], sampling_of(body["sampling"]), body["id"])
        finally:
            self._running.discard(body["id"])
        versions = [span.version for span in made.spans]
        answer = {"token_ids": made.token_ids, "logprobs": made.logprobs, "finish": made.finish, "versions": versions}
        return web.json_response(answer)

    async def _score(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"logprobs": await self._engine.score(body["token_ids"])})

    async def _abort(self, request: web.Request) -> web.Response:
        """Abort one request, or all with `id: null`."""
        wanted = (await request.json())["id"]
        for each in list(self._running) if wanted is None else [wanted]:
            await self._engine.abort(each)
        return web.json_response({})

    async def _load(self, request: web.Request) -> web.Response:
        """Load the safetensors of a folder as weights `version`. Answers with the checksums of the loaded tensors."""
        body = await request.json()
        self._loaded = True
        sums = await self._engine.update_weights(body["version"], read(Path(body["folder"])))
        return web.json_response({"held": dict(sums)})


def sampling_of(fields: dict[str, Any]) -> Sampling:
    """A `Sampling` from its JSON."""
    return Sampling(**{name: _tuple(value) for name, value in fields.items()})


def read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder's safetensors files, by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise RunError(f"{folder} has no *.safetensors that this node can see")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                yield name, handle.get_tensor(name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the embedded engine.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=4096)
    given = parser.parse_args()
    tokenizer, dtype = load_tokenizer(given.model), getattr(torch, given.dtype)
    engine = LocalEngine(given.model, tokenizer, given.device, dtype, given.slots, given.max_length)
    app = LocalServer(engine, os.environ.get(KEY_VARIABLE, "")).application()
    web.run_app(app, host=given.host, port=given.port, access_log=None, shutdown_timeout=1.0)


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
