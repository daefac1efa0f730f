"""Engine servers that megarl starts: one process group each, on a free port, ended with megarl whatever happens."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.servers import reaper

# What torchrun, or our own launcher, tells a learner rank, beside TORCHELASTIC_…. A server has ranks of its own: with
# these it would wait in vain for a store of its own group that TORCHELASTIC_USE_AGENT_STORE says somebody else keeps.
OF_A_RANK = {"MASTER_ADDR", "MASTER_PORT", "ROLE_NAME"}
OF_A_RANK |= {of + what for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")}
REFUSED = re.compile(r"\S+( \S+)?: error: ")
POLL = 0.25  # seconds between looks at a starting server

Command = Callable[[int], Sequence[str]]  # port → command line


class Server:
    """A server process. `start` may be called again after it ended; each start gets a new free port, unless one is
    given."""

    def __init__(
        self, name: str, command: Command, *, log: Path, environment: Mapping[str, str] | None = None, port: int = 0
    ) -> None:
        self.name = name
        self.log = log
        self.port = self._fixed = port
        self._command = command
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The server's own process (the child of its keeper); 0 when it does not run."""
        if self._process is None:
            return 0
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        pids = children.read_text().split() if children.exists() else []
        return int(pids[0]) if pids else 0

    def start(self) -> None:
        """Start the process; returns at once. Its output goes to `log`, appended."""
        self.port = self._fixed or free_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, reaper.__file__, *self._command(self.port)],
                stdin=subprocess.PIPE,  # closed by our end, however we end: the keeper's signal
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited(), **self._environment},
            )

    async def wait_until(self, healthy: Callable[[], object], deadline: float) -> None:
        """Return when `await healthy()` no longer raises RunError.

        Raises RunError with the log's end when the process exits first, DeadlineExceeded after `deadline` seconds.
        """
        cause = ""
        try:
            async with asyncio.timeout(deadline):
                while self.running:
                    try:
                        await healthy()  # type: ignore[misc]
                        return
                    except RunError as e:
                        cause = str(e)
                    await asyncio.sleep(POLL)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} to become healthy ({cause}; log: {self.log})", deadline) from None
        raise RunError(f"{self.name} ended while starting (log: {self.log}): {self.last_words()}")

    async def stop(self) -> None:
        """End the process group; returns when it is gone."""
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """As `stop`, without an event loop."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(2 * reaper.GRACE + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            raise DeadlineExceeded(f"{self.name} to end", 2 * reaper.GRACE + 5) from None

    def last_words(self) -> str:
        """The log's last lines, on one; what argparse said about the flags, alone."""
        try:
            with open(self.log, "rb") as log:
                log.seek(max(0, self.log.stat().st_size - 2000))
                lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            return "no log"
        refused = lines and REFUSED.match(lines[-1])  # what precedes it is every flag that there is
        return " | ".join(lines[-1:] if refused else lines[-4:])


def inherited() -> dict[str, str]:
    """Our variables, without those of a learner rank."""
    return {n: v for n, v in os.environ.items() if n not in OF_A_RANK and not n.startswith("TORCHELASTIC_")}


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
