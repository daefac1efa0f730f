"""`megarl serve` ends by itself when no client contacts it, as on a node that its scheduler has lost."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from megarl.rollout.servers.idle import IdleTimer, seconds_since_data
from megarl.rollout.servers.process import free_port

ROOT = Path(__file__).parents[2]
BOUND = 240.0  # seconds within which `megarl serve` must have ended, on a busy machine
TICK = 0.02  # seconds: how exactly the kernel counts


def test_the_kernel_reports_when_a_client_last_sent_data() -> None:
    """Only of this port, and of its most recent connection. The age of an open, silent connection grows."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        address = server.getsockname()
        with socket.create_connection(other.getsockname()):
            assert seconds_since_data(address[1]) is None
        begun = time.monotonic()
        with socket.create_connection(address) as first:
            while time.monotonic() < begun + 10 * TICK:  # time passes; nothing is waited for
                pass
            aged = seconds_since_data(address[1])
            assert aged is not None and 8 * TICK <= aged <= time.monotonic() - begun + TICK
            told = time.monotonic()
            first.sendall(b"GET")
            heard = seconds_since_data(address[1])
            assert heard is not None and heard <= time.monotonic() - told + TICK
            with socket.create_connection(address):
                assert (seconds_since_data(address[1]) or 0.0) <= time.monotonic() - told + TICK


class Clock:
    """A clock that the test moves, and the age of the last data that the kernel would report."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.age: float | None = None

    def timer(self, timeout: float) -> IdleTimer:
        return IdleTimer(30000, timeout, age=lambda port: self.age, clock=lambda: self.now)

    def advance(self, timer: IdleTimer, seconds: int) -> bool:
        """Check every second, until the timer expires or `seconds` have passed. Returns whether it expired."""
        for _ in range(seconds):
            self.now += 1
            if self.age is not None:
                self.age += 1
            if timer.expired():
                return True
        return False


def test_idle_time_counts_from_the_start_and_from_the_last_data() -> None:
    clock = Clock()
    timer = clock.timer(60)
    assert not clock.advance(timer, 50)
    clock.age = 0.0  # data
    assert not clock.advance(timer, 2)
    clock.age = None  # and the connection is closed
    assert not clock.advance(timer, 57)
    assert clock.advance(timer, 4)


def test_an_open_connection_without_data_is_idle() -> None:
    """A pulled cable closes none."""
    clock = Clock()
    clock.age = 0.0
    assert clock.advance(clock.timer(60), 62)


def test_zero_is_no_limit() -> None:
    clock = Clock()
    assert not clock.advance(clock.timer(0), 10_000)


def test_the_timer_restarts_after_its_process_was_stopped() -> None:
    clock = Clock()
    timer = clock.timer(60)
    clock.now += 10_000
    assert not timer.expired()
    assert not clock.advance(timer, 59)
    assert clock.advance(timer, 2)


def test_serve_without_a_client_ends_with_its_server_and_says_why(tmp_path: Path) -> None:
    """The real command with the real engine and a tiny timeout: code 1, one line, no process left."""
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
        reapers = [os.pidfd_open(pid) for pid in _children(job.pid)]
        _, words = job.communicate(timeout=BOUND)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 1
    told = [line for line in words.splitlines() if line.startswith("megarl: ")]
    assert told == [
        f"megarl: local-0 on port {port}: no client has sent anything for 0.5 s (--idle-timeout): the controller, "
        "or the network to it, is gone; the server was stopped"
    ]
    assert len(select.select(reapers, [], [], 0)[0]) == len(reapers), "the server's reaper outlived it"


def _children(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()]
