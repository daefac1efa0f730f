"""One grader process: `python -m megarl.rewards.worker FUNCTION PARENT_PID`, with a socket as standard input.

It first sends `{"ready": true}`, or `{"refused": reason}` and exits. Then it answers one JSON line per response with
another. It exits when the socket closes. On Linux it is killed when its parent dies, even during a grading call.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from dataclasses import asdict

from megarl.errors import UserError
from megarl.rewards.grade import find, judge


def main() -> None:
    path, parent = sys.argv[1], int(sys.argv[2])
    _die_with(parent)
    for asked in (signal.SIGTERM, signal.SIGUSR1):  # Slurm signals every process; the controller decides what follows
        signal.signal(asked, signal.SIG_IGN)
    connection = _take_stdin()
    lines = connection.makefile("rwb")

    def send(message: dict[str, object]) -> None:
        lines.write(json.dumps(message).encode() + b"\n")
        lines.flush()

    try:
        function = find(path)
    except UserError as e:
        send({"refused": str(e)})
        return
    send({"ready": True})
    for line in lines:
        response, answer = json.loads(line)
        send(asdict(judge(function, response, answer)))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        sys.exit()


def _take_stdin() -> socket.socket:
    """The socket, where a grading function that reads standard input cannot reach it. What it prints goes to stderr."""
    connection = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


if __name__ == "__main__":
    main()
