"""JSON over HTTP to one server: every request has a timeout, and every error names the server."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote

import aiohttp

from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.in_engine.megarl_guard import HEARD_HEADER, RUN_HEADER, run_header

# Shorter than the servers' own keep-alive time (uvicorn: 5 s): else we would send on a connection as they close it.
KEEP_ALIVE = 2.0


class ServerError(RunError):
    """The server failed, or its answer is invalid. The same request may succeed on another server."""


class Refused(RunError):
    """The server rejected the request (HTTP 4xx). Any other server would reject it too."""


class WrongKey(Refused):
    """The server asks for another API key. Waiting does not help."""


class Taken(Refused):
    """The server serves another run. `heard`: seconds since it last heard that run."""

    def __init__(self, message: str, heard: float) -> None:
        super().__init__(message)
        self.heard = heard


class Run(NamedTuple):
    """The run that asks. A server serves one at a time, and weight versions name it."""

    id: str
    name: str

    @classmethod
    def new(cls, name: str) -> Run:
        """A run with an id of its own. No other process knows it."""
        return cls(secrets.token_hex(8), name)


class Endpoint:
    """One HTTP server at `http://host:port`. Use from one event loop."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        run: Run | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """`check` is called for every new connection, before the key is sent on it. It may raise."""
        self.address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers |= {RUN_HEADER: run_header(*run)} if run else {}
        self._check = check
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, *, timeout: float, purpose: str) -> Any:
        """GET `path` and return the JSON of the answer. Errors as of `post`."""
        return await self._request("GET", path, None, timeout, purpose)

    async def post(
        self, path: str, payload: dict[str, Any] | None = None, *, timeout: float, purpose: str, decode: bool = True
    ) -> Any:
        """POST `payload` as JSON and return the JSON of the answer. None if it is empty, or without `decode`.

        Raises ServerError (unreachable, 5xx, not JSON), Refused (4xx; WrongKey, Taken), or DeadlineExceeded after
        `timeout` seconds.
        `purpose` completes the sentence "gave up … waiting for".
        """
        return await self._request("POST", path, payload, timeout, purpose, decode)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(
        self, method: str, path: str, payload: Any, timeout: float, purpose: str, decode: bool = True
    ) -> Any:
        try:
            async with asyncio.timeout(timeout):
                async with self._connected().request(method, self.address + path, json=payload) as response:
                    body = await response.read()
        except TimeoutError:
            raise DeadlineExceeded(f"{purpose} from {self.address}{path}", timeout) from None
        except (aiohttp.ClientError, OSError, RuntimeError) as e:  # RuntimeError: the session was closed meanwhile
            raise ServerError(f"{self.address}{path}: {type(e).__name__}: {e}") from None
        if response.status >= 400:
            raise self._failure(path, response, body)
        if not body or not decode:
            return None
        try:
            return json.loads(body)
        except ValueError:
            raise ServerError(f"{self.address}{path}: not JSON: {_excerpt(body)}") from None

    def _failure(self, path: str, response: aiohttp.ClientResponse, body: bytes) -> RunError:
        status, headers = response.status, response.headers
        where = f"{self.address}{path}: HTTP {status}"
        if status in (401, 403):
            key = "rollout.servers.api_key_env or api_key_file must name the server's"
            return WrongKey(f"{where}: wrong or missing key; {key}")
        if status == 409 and RUN_HEADER in headers:
            run = unquote(headers[RUN_HEADER])
            told = f"{self.address} serves another run, {run}; end that run, or name another server"
            return Taken(told, float(headers.get(HEARD_HEADER, "0")))
        kind = Refused if status < 500 and status not in (408, 429) else ServerError
        return kind(f"{where}: {_excerpt(body)}")

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(self._connection_made)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
                timeout=aiohttp.ClientTimeout(total=None),  # `_request` has the only timeout
                headers=self._headers,
                trace_configs=[trace],
            )
        return self._session

    async def _connection_made(self, *_: object) -> None:
        self._check()


def _excerpt(body: bytes) -> str:
    return " ".join(body.decode("utf-8", "replace").split())[:300]
