"""The processes of a started server, and what its API key must do."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from megarl.rollout.servers.process import Server

GUARDED = {  # what generates, and what controls
    "sglang": ("/generate", "/abort_request"),
    "vllm": ("/inference/v1/generate", "/abort_requests"),
}


def pid_of(server: Server) -> int:
    """The server's process, the only child of its reaper's inner process."""
    assert server.reaper is not None
    return only_child(only_child(server.reaper.pid))


def only_child(parent: int) -> int:
    (pid,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(pid)


async def check_the_key(server: Server, key: str, *posts: str) -> None:
    """Requests without it, or with another one, are refused with 401, those with it are not; no process of the server
    has it on its command line, and the log does not hold it."""
    paths = [("GET", "/v1/models"), *(("POST", path) for path in posts)]
    async with aiohttp.ClientSession() as session:
        for method, path in paths:
            for given in (None, "guess", key[:-1], key):
                headers = {} if given is None else {"Authorization": f"Bearer {given}"}
                async with session.request(method, server.address + path, json={}, headers=headers) as response:
                    assert (response.status == 401) == (given != key), (path, given, response.status)
    lines = command_lines(server)
    assert len(lines) > 1 and not any(key in line for line in lines), "the key is on a command line"
    assert key not in server.log.read_text(), "the key is in the log"


def command_lines(server: Server) -> list[str]:
    """Of the server's reaper, and of every process of the session that the server leads."""
    assert server.reaper is not None
    leader = pid_of(server)
    found = [Path(f"/proc/{server.reaper.pid}/cmdline").read_text()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            session = int((process / "stat").read_text().rpartition(")")[2].split()[3])
            if session == leader:
                found.append((process / "cmdline").read_text())
        except FileNotFoundError:  # ended meanwhile
            continue
    return found
