"""Server processes that megarl starts: each on a bound port, ended with all its descendants when megarl ends.

A port that is free when it is chosen may be another program's when the server binds it, seconds later. That program
would be taken for the server, and would get the API key. So we bind the port first, and check for every connection that
a process which we started listens there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.servers import reaper
from megarl.rollout.servers.http import ServerError, Taken, WrongKey

# torchrun and our launcher set these, and TORCHELASTIC_…, for a learner rank. A server has its own ranks. With these it
# would wait for a rendezvous store of its own that nobody serves, because of TORCHELASTIC_USE_AGENT_STORE.
RANK_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "ROLE_NAME", "MEGARL_STORE"}
RANK_VARIABLES |= {of + what for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")}
ARGPARSE_ERROR = re.compile(r"\S+( \S+)?: error: ")
LOOPBACK = "127.0.0.1"
POLL = 0.25  # seconds between checks of a starting server
STOP_TIMEOUT = 3 * reaper.GRACE + 5

Command = Callable[[int], Sequence[str]]  # port → command line


class Server:
    """A server process. `start` may be called again after it ended. Each start uses a new free port, or `port`."""

    def __init__(
        self,
        name: str,
        command: Command,
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        host: str = LOOPBACK,
        port: int = 0,
        takes_socket: bool = False,
    ) -> None:
        """`environment`: variables in addition to ours. `port` 0: any free one.

        `takes_socket`: the program takes `--fd NUMBER`, a listening socket that it inherits.
        """
        self.name = name
        self.command = command
        self.log = log
        self.environment = dict(environment or {})
        self.host = host
        self.port = self._fixed_port = port
        self.takes_socket = takes_socket
        self.reaper: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._listener: tuple[Path, str] | None = None  # the server's file descriptor, and the socket that it is

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def running(self) -> bool:
        return self.reaper is not None and self.reaper.poll() is None

    def start(self) -> None:
        """Start the process and return at once. Appends its output to `log`. Raises RunError if the port is in use."""
        if self._socket is None:
            self._socket = bound(self.host, self._fixed_port, listen=self.takes_socket)
        self.port = self._socket.getsockname()[1]
        self._listener = None
        passed = [self._socket.fileno()] if self.takes_socket else []
        flags = [word for number in passed for word in ("--fd", str(number))]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.reaper = subprocess.Popen(
                [sys.executable, reaper.__file__, *self.command(self.port), *flags],
                stdin=subprocess.PIPE,  # closes when we exit, however that happens
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited(), **self.environment},
                pass_fds=passed,
            )
        if self.takes_socket and not self._fixed_port:
            self._let_go()  # else a connection to a dead server would wait instead of failing

    def check_listener(self) -> None:
        """Raises ServerError unless a process that we started listens on our port."""
        if self._listener is None:
            self._listener = next(self._listeners(), None)
            if self._listener is None:
                raise ServerError(f"{self.name} does not listen on port {self.port}")
        descriptor, link = self._listener
        try:
            same = os.readlink(descriptor) == link
        except OSError:
            same = False
        if not same:
            raise ServerError(f"{self.name} does not listen on port {self.port} any more")

    def _listeners(self) -> Iterator[tuple[Path, str]]:
        """(file descriptor, socket) of every process of ours that listens on our port."""
        if self.reaper is None:
            return
        try:
            ours = psutil.Process(self.reaper.pid).children(recursive=True)
        except psutil.Error:
            return
        for process in ours:
            try:
                for found in process.net_connections("tcp"):
                    if found.status == psutil.CONN_LISTEN and found.laddr.port == self.port:
                        descriptor = Path(f"/proc/{process.pid}/fd/{found.fd}")
                        yield descriptor, os.readlink(descriptor)
            except (psutil.Error, OSError):  # ended meanwhile
                continue

    def _let_go(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def wait_until(self, healthy: Callable[[], Awaitable[object]], timeout: float) -> None:
        """Return as soon as `await healthy()` raises no RunError.

        Raises RunError with the log's end if the process exits first, DeadlineExceeded after `timeout` seconds.
        """
        await retry(healthy, timeout, f"{self.name} to become healthy (log: {self.log})", lambda: self.running)
        if not self.running:
            raise RunError(f"{self.name} ended while starting (log: {self.log}): {self.last_words()}")

    def stop(self) -> None:
        """End the process and its descendants and return when they are gone. Raises DeadlineExceeded."""
        self._let_go()
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

    Raises WrongKey and Taken at once, for waiting does not help, and DeadlineExceeded, with the last error, after
    `timeout` seconds.
    """
    cause = ""
    try:
        async with asyncio.timeout(timeout):
            while go_on():
                try:
                    await attempt()
                    return
                except (WrongKey, Taken):
                    raise
                except RunError as e:
                    cause = str(e)
                await asyncio.sleep(period)
    except TimeoutError:
        raise DeadlineExceeded(f"{purpose} (last error: {cause})", timeout) from None


def inherited() -> dict[str, str]:
    """Our environment without the variables of a learner rank."""
    return {n: v for n, v in os.environ.items() if n not in RANK_VARIABLES and not n.startswith("TORCHELASTIC_")}


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach a server that binds to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int, *, listen: bool) -> socket.socket:
    """A TCP socket bound to `port` of `host` (0: any free port). Raises RunError.

    Without `listen` it only reserves the port: no other socket gets it by chance, and the server, which sets
    SO_REUSEADDR as servers do, may bind it.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as e:
        raise RunError(f"host {host}: {e.strerror}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        if listen:
            made.listen(1024)
    except OSError as e:
        made.close()
        raise RunError(f"port {port} of {host} cannot be used: {e.strerror}; name another") from None
    return made


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
