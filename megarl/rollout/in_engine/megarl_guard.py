"""What a server asks of every request: the API key, and that no other run uses it. vLLM: `--middleware
megarl_guard.Guard`. `megarl_sglang.py` adds the same to SGLang, and rollout/local/server.py to the embedded engine.

vLLM itself requires the key for generation (/v1, /inference …), but not for control. With VLLM_SERVER_DEV_MODE, anyone
who reaches the port could load weights or call any method of the workers (/collective_rpc).
"""

from __future__ import annotations

import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import quote, unquote

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]
Refusal = tuple[int, dict[str, Any], dict[str, str]]  # status, JSON, headers

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own variable; empty or absent: no key is required
OPEN = "/health"  # tells only that the server lives
LEAVE = "/megarl/leave"  # POST: the run that the server serves needs it no more
NCCL = "/megarl/nccl"  # GET: {"nccl": version}, see `nccl_version`
RUN_HEADER = "X-Megarl-Run"  # "ID NAME" of the run that asks; in a refusal, the name of the run that is served
HEARD_HEADER = "X-Megarl-Heard"  # seconds since that run was last heard
LEASE = 30.0  # seconds without a request after which a run counts as gone; the pool asks for health every 10


def run_header(run: str, name: str) -> str:
    """The value of RUN_HEADER. `name` may have any character."""
    return f"{run} {quote(name)}"


def nccl_version() -> list[int] | None:
    """The version of this environment's NCCL: [major, minor, patch]. None if its torch has none."""
    import torch

    return list(torch.cuda.nccl.version()) if hasattr(torch._C, "_nccl_version") else None


class Gate:
    """Decides on requests by their headers, whose names are in lower case and whose values are bytes."""

    def __init__(self, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`key` empty: none is required."""
        self._wanted = f"Bearer {key}".encode() if key else b""
        self._clock = clock
        self._served = ""  # RUN_HEADER of the run that is served
        self._heard = 0.0

    def refusal(self, method: str, path: str, headers: Mapping[str, list[bytes]]) -> Refusal | None:
        """Why the request is refused: 401 without the key, 409 while another run is served. None: it is admitted."""
        given = headers.get("authorization", [])
        if self._wanted and path != OPEN and not (len(given) == 1 and hmac.compare_digest(given[0], self._wanted)):
            return 401, {"error": "wrong or missing api key"}, {}
        run = b" ".join(headers.get(RUN_HEADER.lower(), [])).decode("ascii", "replace")
        now = self._clock()
        if self._served and run != self._served and now - self._heard < LEASE:
            if method in ("GET", "HEAD") and not run:  # whoever only looks is no run
                return None
            name = self._served.partition(" ")[2]  # not the id, which would admit whoever knows it
            told = f"this engine serves the run {unquote(name)}, heard {now - self._heard:.1f} s ago"
            return 409, {"error": told}, {RUN_HEADER: name, HEARD_HEADER: f"{now - self._heard:.3f}"}
        if run:
            self._served, self._heard = ("" if path == LEAVE else run), now
        return None


class Guard:
    """ASGI middleware: a `Gate` in front of every path."""

    def __init__(self, app: Application, key: str | None = None) -> None:
        """`key`: default, the one in KEY_VARIABLE."""
        self._app = app
        self._gate = Gate(os.environ.get(KEY_VARIABLE, "") if key is None else key)

    async def __call__(
        self, scope: Scope, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers: dict[str, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value)
        refusal = self._gate.refusal(scope.get("method", ""), path, headers)
        if refusal is None and path == LEAVE:
            refusal = 200, {}, {}
        if refusal is None and path == NCCL:
            refusal = 200, {"nccl": nccl_version()}, {}
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # policy violation
        else:
            status, answer, more = refusal
            body = json.dumps(answer).encode()
            told = {"content-type": "application/json", "content-length": str(len(body)), **more}
            pairs = [(name.lower().encode(), value.encode()) for name, value in told.items()]
            await send({"type": "http.response.start", "status": status, "headers": pairs})
            await send({"type": "http.response.body", "body": body})
