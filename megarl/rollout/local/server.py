"""The embedded engine as a server, so that it may run on another node than the learner.

    python -m megarl.rollout.local.server --model FOLDER --port 30000     what `megarl serve` starts for engine: local

Token ids in, token ids out, as JSON. The client is rollout/servers/local.py. There are no weights until the first
`/load`. If the variable MEGARL_ENGINE_KEY contains a key, every request must present it. A wrong request is answered
with one line and changes nothing for the others.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import torch
from aiohttp import web
from safetensors import safe_open

from megarl.errors import RunError, UserError
from megarl.models.tokenizer import load_tokenizer
from megarl.rollout.in_engine.megarl_guard import LEAVE, Gate
from megarl.rollout.in_engine.megarl_sglang import KEY_VARIABLE
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.local.requests import AbortBody, GenerateBody, LoadBody, ScoreBody

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

BODY_BASE, BODY_PER_TOKEN = 1 << 20, 16  # bytes of a request: its stops, and one token id of the longest sequence


class LocalServer:
    """Routes of one `LocalEngine`. Refuses requests with a wrong key, unless `api_key` is empty, and a second run."""

    def __init__(self, engine: LocalEngine, api_key: str = "") -> None:
        self._engine = engine
        self._gate = Gate(api_key)
        self._labels: list[str] = []  # of every load; the engine counts them
        self._running: set[str] = set()

    def application(self) -> web.Application:
        limit = BODY_BASE + BODY_PER_TOKEN * self._engine.max_length
        app = web.Application(client_max_size=limit, middlewares=[self._guard])
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/score", self._score)
        app.router.add_post("/abort", self._abort)
        app.router.add_post("/load", self._load)
        app.router.add_post(LEAVE, self._leave)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check who asks, and turn errors into HTTP: 4xx for a bad request, 5xx for a failure of the engine."""
        headers: dict[str, list[bytes]] = {}
        for name, value in request.raw_headers:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value)
        if refusal := self._gate.refusal(request.method, request.path, headers):
            status, answer, more = refusal
            return web.json_response(answer, status=status, headers=more)
        # A page in a browser may post plain text to any address, but JSON only to servers that allow it.
        if request.can_read_body and request.content_type != "application/json":
            told = f"Content-Type: {request.content_type}: only application/json is understood"
            return web.json_response({"error": told}, status=415)
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            limit = request.client_max_size
            return web.json_response({"error": f"the request has more than {limit} bytes"}, status=413)
        except UserError as e:
            return web.json_response({"error": str(e)}, status=400)
        except RunError as e:
            return web.json_response({"error": str(e)}, status=500)

    async def _models(self, request: web.Request) -> web.Response:
        if self._labels:
            await self._engine.health()
        return web.json_response({"data": [{"id": "policy"}]})

    async def _generate(self, request: web.Request) -> web.Response:
        body = GenerateBody.parse(await request.read())
        if body.id in self._running:
            raise UserError(f"id: '{body.id}' is the id of a request that is running")
        self._running.add(body.id)
        try:
            made = await self._engine.generate(body.token_ids, body.to_sampling(), body.id)
        finally:
            self._running.discard(body.id)
        versions = [self._labels[span.version] for span in made.spans]
        answer = {"token_ids": made.token_ids, "logprobs": made.logprobs, "finish": made.finish, "versions": versions}
        return web.json_response(answer)

    async def _score(self, request: web.Request) -> web.Response:
        body = ScoreBody.parse(await request.read())
        return web.json_response({"logprobs": await self._engine.score(body.token_ids)})

    async def _abort(self, request: web.Request) -> web.Response:
        """Abort one request, or all with `id: null`."""
        wanted = AbortBody.parse(await request.read()).id
        for each in list(self._running) if wanted is None else [wanted]:
            await self._engine.abort(each)
        return web.json_response({})

    async def _load(self, request: web.Request) -> web.Response:
        """Load the safetensors of a folder as weights `version`. Answers with the checksums of the loaded tensors.

        A folder with other tensors than the model's is refused, and the weights stay as they are.
        """
        body = LoadBody.parse(await request.read())
        folder = Path(body.folder)
        try:
            self._engine.check_weights(shapes_in(folder))
        except RunError as e:
            raise UserError(f"folder: {folder}: {e}") from None
        self._labels.append(body.version)
        try:
            sums = await self._engine.update_weights(len(self._labels) - 1, read(folder))
        except Exception as e:
            raise RunError(f"{folder} cannot be read: {' '.join(str(e).split())}") from None
        return web.json_response({"held": dict(sums)})

    async def _leave(self, request: web.Request) -> web.Response:
        """The `Gate` has read it."""
        return web.json_response({})


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a folder's safetensors files, by name. Raises RunError."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files_in(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    found[name] = tuple(handle.get_slice(name).get_shape())
        except Exception as e:  # safetensors' own error type is not public
            raise RunError(f"{file.name}: {' '.join(str(e).split())}") from None
    return found


def read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder's safetensors files, by name."""
    for file in files_in(folder):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                yield name, handle.get_tensor(name)


def files_in(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises RunError if there is none."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    if not files:
        raise RunError("there is no *.safetensors that this node can see")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the embedded engine.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fd", type=int, help="a listening socket that was inherited, instead of host and port")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=4096)
    given = parser.parse_args()
    tokenizer, dtype = load_tokenizer(given.model), getattr(torch, given.dtype)
    engine = LocalEngine(given.model, tokenizer, given.device, dtype, given.slots, given.max_length)
    app = LocalServer(engine, os.environ.pop(KEY_VARIABLE, "")).application()
    place = {"host": given.host, "port": given.port} if given.fd is None else {"sock": socket.socket(fileno=given.fd)}
    # Bodies stay as they were sent: a small one must not unpack to a large one.
    web.run_app(app, **place, access_log=None, shutdown_timeout=1.0, auto_decompress=False)


if __name__ == "__main__":
    main()
