"""`megarl serve` ends by itself once no client has spoken to it for long, as on a node that its scheduler has lost."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from megarl.rollout.servers.idle import Idleness, silence
from megarl.rollout.servers.process import free_port

ROOT = Path(__file__).parents[2]
BOUND = 240.0  # seconds within which `megarl serve` must have ended, on a busy machine
TICK = 0.02  # seconds: how exactly the kernel counts


def test_the_kernel_tells_when_a_client_last_sent_something() -> None:
    """Of this port alone, and of the connection that was heard last; an open, silent connection ages."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        address = server.getsockname()
        with socket.create_connection(other.getsockname()):
            assert silence(address[1]) is None
        begun = time.monotonic()
        with socket.create_connection(address) as first:
            while time.monotonic() < begun + 10 * TICK:  # time passes; nothing is waited for
                pass
            aged = silence(address[1])
            assert aged is not None and 8 * TICK <= aged <= time.monotonic() - begun + TICK
            told = time.monotonic()
            first.sendall(b"GET")
            heard = silence(address[1])
            assert heard is not None and heard <= time.monotonic() - told + TICK
            with socket.create_connection(address):
                assert (silence(address[1]) or 0.0) <= time.monotonic() - told + TICK


class Clock:
    """A clock that the test moves, and the silence that the kernel would tell."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.silent: float | None = None

    def idle(self, deadline: float) -> Idleness:
        return Idleness(30000, deadline, silence=lambda port: self.silent, clock=lambda: self.now)

    def pass_by(self, idle: Idleness, seconds: int) -> bool:
        """Look every second, until the deadline or the end."""
        for _ in range(seconds):
            self.now += 1
            if self.silent is not None:
                self.silent += 1
            if idle.look():
                return True
        return False


def test_silence_counts_from_the_last_word_and_from_the_start() -> None:
    clock = Clock()
    idle = clock.idle(60)
    assert not clock.pass_by(idle, 50)
    clock.silent = 0.0  # a word
    assert not clock.pass_by(idle, 2)
    clock.silent = None  # and the connection is closed
    assert not clock.pass_by(idle, 57)
    assert clock.pass_by(idle, 4)


def test_an_open_connection_that_says_nothing_is_silence() -> None:
    """A pulled cable closes none."""
    clock = Clock()
    clock.silent = 0.0
    assert clock.pass_by(clock.idle(60), 62)


def test_zero_is_no_deadline() -> None:
    clock = Clock()
    assert not clock.pass_by(clock.idle(0), 10_000)


def test_who_was_stopped_itself_has_heard_nobody_and_waits_anew() -> None:
    clock = Clock()
    idle = clock.idle(60)
    clock.now += 10_000
    assert not idle.look()
    assert not clock.pass_by(idle, 59)
    assert clock.pass_by(idle, 2)


def test_serve_without_a_client_ends_with_its_server_and_says_why(tmp_path: Path) -> None:
    """The real command with the real engine and a tiny deadline: code 1, one line, no process left."""
    port = free_port()
    settings = [f"run={tmp_path / 'run'}", "rollout.engine=local", "rollout.servers.device=cpu"]
    command = [sys.executable, "-m", "megarl.cli", "serve", "slurm/configs/tiny.yaml", *settings]
    job = subprocess.Popen(
        [*command, "--port", str(port), "--idle-timeout", "0.5"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert job.stderr is not None
        first = job.stderr.readline()
        assert first.startswith("local-0: start 0 on port"), first
        keepers = [os.pidfd_open(pid) for pid in _children(job.pid)]
        _, words = job.communicate(timeout=BOUND)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 1
    told = [line for line in words.splitlines() if line.startswith("megarl: ")]
    assert told == [
        f"megarl: local-0 on port {port}: no client has sent anything for 0.5 s (--idle-timeout): its controller, or "
        "the way to it, is gone; the server has been ended"
    ]
    assert len(select.select(keepers, [], [], 0)[0]) == len(keepers), "the server's keeper outlived it"


def _children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()]
