"""One grader: `python -m megarl.rewards.worker FUNCTION PARENT_PID`, with a socket as standard input.

Two processes. The inner one grades. It first sends `{"ready": true}`, or `{"refused": reason}` and exits. Then it
answers each JSON line `[id, response, answer]` with `[id, grade]`, and exits when the socket closes.

The outer one adopts whatever the grading function starts, also in sessions of its own. When the inner process or the
parent ends, even by `kill -9`, it kills them all and ends with the inner one's exit status.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
from dataclasses import asdict, replace
from functools import partial

from megarl.errors import UserError
from megarl.rewards.grade import Grade, GradingFunction, failed, find, judge
from megarl.rewards.processes import end_descendants

FORK_GRACE = 0.5  # seconds for a process that the function forked to end; a pool that stays open costs this once
MESSAGE = 1000  # characters of a grade's message that are kept
DIE_WITH_PARENT, ADOPT_ORPHANS = 1, 36  # options of Linux's prctl
WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    path, parent = sys.argv[1], int(sys.argv[2])
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    _prctl(ADOPT_ORPHANS, 1)
    _prctl(DIE_WITH_PARENT, signal.SIGTERM)
    outer = os.getpid()
    inner = os.fork()
    if inner:
        os.close(0)
        _watch(inner, parent)
    os.setsid()
    _prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != outer:  # it died before we asked
        return
    _stay(True)
    os.register_at_fork(after_in_child=partial(_stay, False))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
    _serve(path)


def _stay(stay: bool) -> None:
    """Whether SIGTERM and SIGUSR1 are without effect: Slurm sends them to every process, and the controller decides
    what follows. What the function starts must not inherit this: a pool ends its processes by SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, (lambda *_: None) if stay else signal.SIG_DFL)


def _serve(path: str) -> None:
    lines = _take_stdin().makefile("rwb")

    def send(message: object) -> None:
        lines.write(json.dumps(message).encode() + b"\n")
        lines.flush()

    try:
        function = find(path)
    except UserError as e:
        send({"refused": _one_line(str(e))})
        return
    send({"ready": True})
    for line in lines:
        number, response, answer = json.loads(line)
        grade = _alone(function, response, answer)
        send([number, asdict(replace(grade, message=_one_line(grade.message)))])


def _alone(function: GradingFunction, response: str, answer: str) -> Grade:
    """The grade, if only this process comes back with one. A forked copy that comes back too ends here."""
    process = os.getpid()
    copies, returned = os.pipe()  # closes at exec: only forked copies have it
    try:
        grade = judge(function, response, answer)
        if os.getpid() != process:
            try:
                os.write(returned, b"!")
            finally:
                os._exit(1)
    finally:
        os.close(returned)
    ready, _, _ = select.select([copies], [], [], FORK_GRACE)
    came_back = bool(ready and os.read(copies, 1))
    os.close(copies)
    return failed("error", response, "the grading function forked, and returned twice") if came_back else grade


def _one_line(message: str) -> str:
    """Without line breaks and control characters, which would reach a terminal."""
    printable = (c if c.isprintable() else " " for c in message[: 2 * MESSAGE])
    return " ".join("".join(printable).split())[:MESSAGE]


def _watch(inner: int, parent: int) -> None:
    """Until the inner process or the parent has ended; then end everything, and leave as the inner process did."""
    while os.getppid() == parent:
        while (gone := _reap()) and gone[0] != inner:
            pass
        if gone:
            _end_all()
            _leave(gone[1])
        signal.sigwait(WATCHED)
    _end_all()
    os._exit(0)


def _end_all() -> None:
    end_descendants(os.getpid())
    while _reap():
        pass


def _reap() -> tuple[int, int] | None:
    """A child that has ended: its id and its wait status."""
    try:
        process, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (process, status) if process else None


def _leave(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        os._exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the inner process has left its own
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
    os.kill(os.getpid(), -code)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _take_stdin() -> socket.socket:
    """The socket, where a grading function that reads standard input cannot reach it. What it prints goes to stderr."""
    connection = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return connection


if __name__ == "__main__":
    main()
