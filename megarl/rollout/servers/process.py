"""Server processes that megarl starts: each on a free port, ended with all its descendants when megarl ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.servers import reaper

# torchrun and our launcher set these, and TORCHELASTIC_…, for a learner rank. A server has its own ranks. With these it
# would wait for a rendezvous store of its own that nobody serves, because of TORCHELASTIC_USE_AGENT_STORE.
RANK_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "ROLE_NAME", "MEGARL_STORE"}
RANK_VARIABLES |= {of + what for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")}
ARGPARSE_ERROR = re.compile(r"\S+( \S+)?: error: ")
POLL = 0.25  # seconds between checks of a starting server
STOP_TIMEOUT = 3 * reaper.GRACE + 5

Command = Callable[[int], Sequence[str]]  # port → command line


class Server:
    """A server process. `start` may be called again after it ended. Each start uses a new free port, or `port`."""

    def __init__(
        self, name: str, command: Command, *, log: Path, environment: Mapping[str, str] | None = None, port: int = 0
    ) -> None:
        """`environment`: variables in addition to ours. `port` 0: any free one."""
        self.name = name
        self.command = command
        self.log = log
        self.environment = dict(environment or {})
        self.port = self._fixed_port = port
        self.reaper: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self.reaper is not None and self.reaper.poll() is None

    def start(self) -> None:
        """Start the process and return at once. Appends its output to `log`."""
        self.port = self._fixed_port or free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.reaper = subprocess.Popen(
                [sys.executable, reaper.__file__, *self.command(self.port)],
                stdin=subprocess.PIPE,  # closes when we exit, however that happens
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited(), **self.environment},
            )

    async def wait_until(self, healthy: Callable[[], Awaitable[object]], timeout: float) -> None:
        """Return as soon as `await healthy()` raises no RunError.

        Raises RunError with the log's end if the process exits first, DeadlineExceeded after `timeout` seconds.
        """
        await retry(healthy, timeout, f"{self.name} to become healthy (log: {self.log})", lambda: self.running)
        if not self.running:
            raise RunError(f"{self.name} ended while starting (log: {self.log}): {self.last_words()}")

    def stop(self) -> None:
        """End the process and its descendants and return when they are gone. Raises DeadlineExceeded."""
        process, self.reaper = self.reaper, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        process.send_signal(signal.SIGCONT)  # it may be stopped
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise DeadlineExceeded(f"{self.name} to end", STOP_TIMEOUT) from None

    def last_words(self) -> str:
        """The last lines of the log, as one line. If argparse refused the flags, only what it said about them."""
        try:
            with open(self.log, "rb") as log:
                log.seek(max(0, self.log.stat().st_size - 2000))
                lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            return "no log"
        refused = lines and ARGPARSE_ERROR.match(lines[-1])  # the lines before list every known flag
        return " | ".join(lines[-1:] if refused else lines[-4:])


async def retry(
    attempt: Callable[[], Awaitable[object]],
    timeout: float,
    purpose: str,
    go_on: Callable[[], bool] = lambda: True,
    period: float = POLL,
) -> None:
    """Repeat `await attempt()` every `period` seconds until it raises no RunError, or `go_on()` is False.

    Raises DeadlineExceeded, with the last error, after `timeout` seconds.
    """
    cause = ""
    try:
        async with asyncio.timeout(timeout):
            while go_on():
                try:
                    await attempt()
                    return
                except RunError as e:
                    cause = str(e)
                await asyncio.sleep(period)
    except TimeoutError:
        raise DeadlineExceeded(f"{purpose} (last error: {cause})", timeout) from None


def inherited() -> dict[str, str]:
    """Our environment without the variables of a learner rank."""
    return {n: v for n, v in os.environ.items() if n not in RANK_VARIABLES and not n.startswith("TORCHELASTIC_")}


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
