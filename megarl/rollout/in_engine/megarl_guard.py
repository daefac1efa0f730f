"""Requires the API key on every path of a vLLM server: `--middleware megarl_guard.Guard`.

vLLM itself requires the key for generation (/v1, /inference …), but not for control. With VLLM_SERVER_DEV_MODE, anyone
who reaches the port could load weights or call any method of the workers (/collective_rpc).
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own variable; empty or absent: no key is required
OPEN = "/health"  # tells only that the server lives
REFUSAL = json.dumps({"error": "wrong api key"}).encode()


class Guard:
    """ASGI middleware: 401 without `Authorization: Bearer KEY`."""

    def __init__(self, app: Application) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE, "")
        self._wanted = f"Bearer {key}".encode() if key else b""

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan" or self._admits(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # policy violation
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(REFUSAL)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})

    def _admits(self, scope: Scope) -> bool:
        if not self._wanted or scope["path"].removeprefix(scope.get("root_path", "")) == OPEN:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._wanted)
