"""Runs one command and ends it, with everything that it started, when the process that asked for it is gone.

    python keeper.py COMMAND …        (standard library only; any interpreter)

The asker holds the other end of standard input. Its end, for whatever reason, closes the pipe: the command's process
group then gets SIGTERM, and SIGKILL after GRACE seconds. The exit code is the command's own. Signals that reach the
keeper (Ctrl-C, or a scheduler's to the whole job) do nothing: ended by one, it would leave the command behind.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 5.0


def main(command: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN, which the command would inherit
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    exited = os.pidfd_open(child.pid)  # readable once the child has exited
    select.select([sys.stdin.fileno(), exited], [], [])
    _signal(child.pid, signal.SIGTERM)  # also the child's leftovers when it exited by itself
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    limit = time.monotonic() + GRACE
    while _alive(child.pid) and time.monotonic() < limit:
        time.sleep(0.05)  # workers of the group finish after their parent; nothing tells when
    _signal(child.pid, signal.SIGKILL)
    return child.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) & 0xFF)
