"""Runs a command and ends it, with every process of its group, when our parent exits.

    python reaper.py COMMAND …        (standard library only; any interpreter)

The parent keeps our stdin open. When it exits, we terminate the command's process group: SIGTERM, then SIGKILL after
GRACE seconds. The exit code is the command's. We ignore signals, such as Ctrl-C or a scheduler's signal to the whole
job: if one ended us, the command would be left behind.
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
        signal.signal(number, lambda *_: None)  # a handler, because the command would inherit SIG_IGN
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    exited = os.pidfd_open(child.pid)  # readable once the child has exited
    select.select([sys.stdin.fileno(), exited], [], [])
    _signal_group(child.pid, signal.SIGTERM)  # also if the child has exited: its group may still run
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE)
    limit = time.monotonic() + GRACE
    while _signal_group(child.pid, 0) and time.monotonic() < limit:
        time.sleep(0.05)  # nothing announces the end of the group's other processes
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait()


def _signal_group(group: int, number: int) -> bool:
    """Whether the group has a process. Signal 0 only asks."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) & 0xFF)
