"""A server and all that descends from it end, whichever of the processes above it dies or is stopped.

The server starts one child in its own session and one that has lost its parent, as sandboxes and daemons do.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from megarl.rollout.servers import reaper
from tests.support.server_processes import only_child

WAIT = 60.0  # seconds, on a busy machine
SERVER = """
import os, subprocess, sys, time
idle = [sys.executable, "-c", "import time; time.sleep(600)"]
print(os.getpid(), subprocess.Popen(idle, start_new_session=True).pid)
orphan = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True).pid, flush=True)"
subprocess.run([sys.executable, "-c", orphan, *idle])
print("up", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
print(child.pid, flush=True)
time.sleep(600)
"""


class Family:
    """A parent, its reaper's two processes, and what the server started."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", PARENT, sys.executable, reaper.__file__, sys.executable, "-u", "-c", SERVER]
        self.parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.parent.stdout is not None
        words = "".join(iter(self.parent.stdout.readline, "up\n")).split()
        self.outer = int(words[0])
        self.inner = only_child(self.outer)
        self.pids = [self.inner, *map(int, words[1:])]
        assert len(self.pids) == 4
        self.ends = [os.pidfd_open(pid) for pid in (self.outer, *self.pids)]

    def check_all_end(self) -> None:
        """The outer one too: whoever is above it reaps it."""
        waits = list(self.ends)
        while waits:
            readable, _, _ = select.select(waits, [], [], WAIT)
            assert readable, f"{len(waits)} processes are left"
            waits = [fd for fd in waits if fd not in readable]


def stop_outer_then_kill_parent(family: Family) -> None:
    os.kill(family.outer, signal.SIGSTOP)
    family.parent.kill()


def stop_both_then_kill_parent(family: Family) -> None:
    os.kill(family.inner, signal.SIGSTOP)
    stop_outer_then_kill_parent(family)


def stop_server_then_kill_parent(family: Family) -> None:
    os.kill(family.pids[1], signal.SIGSTOP)
    family.parent.kill()


ATTACKS: dict[str, Callable[[Family], None]] = {
    "kill outer": lambda family: os.kill(family.outer, signal.SIGKILL),
    "kill inner": lambda family: os.kill(family.inner, signal.SIGKILL),
    "kill server": lambda family: os.kill(family.pids[1], signal.SIGKILL),
    "kill parent": lambda family: family.parent.kill(),
    "kill the whole group": lambda family: os.killpg(family.parent.pid, signal.SIGKILL),
    "stop outer, kill parent": stop_outer_then_kill_parent,
    "stop both, kill parent": stop_both_then_kill_parent,
    "stop server, kill parent": stop_server_then_kill_parent,
}


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_left(attack: str) -> None:
    """Proves that the server, its child in another session and the orphan end after every attack."""
    family = Family()
    try:
        ATTACKS[attack](family)
        family.check_all_end()
    finally:
        family.parent.kill()
        family.parent.wait()
