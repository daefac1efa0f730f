"""JSON over HTTP to one server: every request has a timeout, and every error names the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

from megarl.errors import DeadlineExceeded, RunError

# Shorter than the servers' own keep-alive time (uvicorn: 5 s): else we would send on a connection as they close it.
KEEP_ALIVE = 2.0


class ServerError(RunError):
    """The server failed, or its answer is invalid. The same request may succeed on another server."""


class Refused(RunError):
    """The server rejected the request (HTTP 4xx). Any other server would reject it too."""


class Endpoint:
    """One HTTP server at `http://host:port`. Use from one event loop."""

    def __init__(self, address: str, *, api_key: str | None = None) -> None:
        self.address = address.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, *, timeout: float, purpose: str) -> Any:
        """GET `path` and return the JSON of the answer. Errors as of `post`."""
        return await self._request("GET", path, None, timeout, purpose)

    async def post(
        self, path: str, payload: dict[str, Any] | None = None, *, timeout: float, purpose: str, decode: bool = True
    ) -> Any:
        """POST `payload` as JSON and return the JSON of the answer. None if it is empty, or without `decode`.

        Raises ServerError (unreachable, 5xx, not JSON), Refused (4xx), or DeadlineExceeded after `timeout` seconds.
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
            kind = Refused if response.status < 500 and response.status not in (408, 429) else ServerError
            raise kind(f"{self.address}{path}: HTTP {response.status}: {_excerpt(body)}")
        if not body or not decode:
            return None
        try:
            return json.loads(body)
        except ValueError:
            raise ServerError(f"{self.address}{path}: not JSON: {_excerpt(body)}") from None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE),
                timeout=aiohttp.ClientTimeout(total=None),  # `_request` has the only timeout
                headers=self._headers,
            )
        return self._session


def _excerpt(body: bytes) -> str:
    return " ".join(body.decode("utf-8", "replace").split())[:300]
