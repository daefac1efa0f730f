"""Runs a command and ends it, with every process that descends from it, when our parent exits.

    python reaper.py COMMAND …        (standard library only; any interpreter)

The command inherits the file descriptors that we were given. The parent keeps our stdin open. When it exits, we
terminate the command and its descendants, in whatever session they are: SIGTERM, then SIGKILL after GRACE seconds. The
exit code is the command's. We ignore signals, such as Ctrl-C or a scheduler's signal to the whole job: if one ended us,
the command would be left behind.

SIGKILL cannot be ignored, so there are two of us: the outer process, which our parent knows, and the inner one, which
runs the command. Each ends everything when the other dies. A stopped one is continued by the other, and by the kernel
when its parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 5.0
THREADS = 15  # position of a process's thread count in /proc/PID/stat, after its parent
POLL = 0.05  # seconds; nothing announces the end of descendants
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
prctl = ctypes.CDLL(None).prctl


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # a handler, because the command would inherit SIG_IGN
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes our child
    outer, inner = os.getpid(), os.fork()
    if inner == 0:
        return run(command, outer)
    close_files()
    exited = os.pidfd_open(inner)  # readable once it has exited
    select.select([sys.stdin.fileno(), exited], [], [])
    os.kill(inner, signal.SIGCONT)
    if not select.select([exited], [], [], 2 * GRACE + 2)[0]:
        os.kill(inner, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    end_descendants(signal.SIGKILL)
    return code


def run(command: list[str], outer: int) -> int:
    """Of the inner process: run the command until it exits, or the parent or the outer process does."""
    os.setsid()  # a signal to the outer one's group, such as SIGKILL, does not reach us
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    inner = os.getpid()
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=False,
        preexec_fn=lambda: _die_with(inner),
    )
    close_files()
    exited = os.pidfd_open(child.pid)
    with contextlib.suppress(ProcessLookupError):
        other = os.pidfd_open(outer)
        if os.getppid() == outer:
            select.select([sys.stdin.fileno(), exited, other], [], [])
    if not end_descendants(signal.SIGTERM):
        end_descendants(signal.SIGKILL)
    return child.wait()


def close_files() -> None:
    """What the command inherits from us, such as a listening socket, must end with the command."""
    os.closerange(3, 1 << 16)


def end_descendants(number: signal.Signals) -> bool:
    """Send a signal to all of them, and to those that appear meanwhile. Whether they are gone within GRACE seconds."""
    limit = time.monotonic() + GRACE
    told: set[int] = set()
    while left := descendants():
        for pid in left - told:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        told |= left
        if time.monotonic() > limit:
            return False
        time.sleep(POLL)
    return True


def descendants() -> set[int]:
    """The living processes that descend from this one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                state, parent, *rest = file.read().rpartition(b")")[2].split()
                if state not in (b"Z", b"X") or int(rest[THREADS]) > 1:
                    children.setdefault(int(parent), []).append(int(entry))
    found: set[int] = set()
    level = [os.getpid()]
    while level:
        level = [child for parent in level for child in children.get(parent, ())]
        found |= set(level)
    return found


def _die_with(parent: int) -> None:
    """In the command's process, before it becomes the command."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) & 0xFF)
