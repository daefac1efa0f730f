"""Grading functions of every temper, named by the answer they are given; imported by worker processes."""

import asyncio
import gc
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time


def by_answer(response: str, answer: str) -> object:
    """Do what the answer says."""
    kind, _, argument = answer.partition(" ")
    return globals()[kind](response, argument)


def equal(response: str, argument: str) -> bool:
    return response == argument


def value(response: str, argument: str) -> object:
    return eval(argument, {"__builtins__": {}}, {"nan": float("nan")})


def length(response: str, argument: str) -> int:
    return len(response)


def pid(response: str, argument: str) -> int:
    return os.getpid()


def imported(response: str, argument: str) -> bool:
    return argument in sys.modules


def talk(response: str, argument: str) -> bool:
    print("a grading function may print")
    return sys.stdin.read() == ""


def throw(response: str, argument: str) -> bool:
    raise KeyError(argument)


def leave(response: str, argument: str) -> bool:
    sys.exit(argument)


def vanish(response: str, argument: str) -> bool:
    os._exit(3)


def killed_once(response: str, marker: str) -> bool:
    """`kill -9` from outside, the first time only."""
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return True


def crash(response: str, argument: str) -> bool:
    os.kill(os.getpid(), signal.SIGSEGV)
    return False


def spin(response: str, argument: str) -> bool:
    while True:
        pass


def spin_in_c(response: str, argument: str) -> bool:
    """Backtracks for years without letting go of the interpreter's lock."""
    return bool(re.match(r"(a+)+b", "a" * 60))


def spin_with_child(response: str, fifo: str) -> bool:
    """Hold the pipe open, in this process and in a child of it, and never come back."""
    pipe = os.open(fifo, os.O_WRONLY)
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=[pipe])
    os.write(pipe, b"!")
    while True:
        pass


def spin_alone(response: str, fifo: str) -> bool:
    """Hold the pipe open in this process, and never come back."""
    os.write(os.open(fifo, os.O_WRONLY), b"!")
    while True:
        pass


def fork(response: str, argument: str) -> bool:
    """Two processes come back; the argument chooses what the forked one does before."""
    if os.fork() == 0 and argument == "raise":
        raise ValueError("in the copy")
    return True


def pool(response: str, argument: str) -> bool:
    """What a forked process computes; none of it comes back by itself."""
    with multiprocessing.get_context("fork").Pool(2) as workers:
        return workers.map(abs, [-1, -2]) == [1, 2]


def cancel(response: str, argument: str) -> bool:
    raise asyncio.CancelledError("cancelled")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def unprintable(response: str, argument: str) -> object:
    return Unprintable()


async def coroutine(response: str, argument: str) -> bool:
    return True


def complain(response: str, length: str) -> bool:
    raise ValueError("first\nsecond\x1b[2J " + "x" * int(length))


def _connection() -> socket.socket:
    """The grader's own, which a function can find if it wants to."""
    [found] = [each for each in gc.get_objects() if isinstance(each, socket.socket) and each.family == socket.AF_UNIX]
    return found


def write(response: str, text: str) -> bool:
    """Write bytes to the grader's socket, then return a grade."""
    _connection().sendall(eval(text))
    return True


def flood(response: str, argument: str) -> bool:
    connection = _connection()
    while True:
        connection.sendall(b"x" * 65536)


def trickle(response: str, argument: str) -> bool:
    """A byte now and then, never a line."""
    connection = _connection()
    while True:
        connection.sendall(b"x")
        time.sleep(0.01)


def start_session(response: str, fifo: str, environment: dict[str, str] | None = None) -> bool:
    """Leave a process in a session of its own, without our environment, that has the pipe open; its parent is gone."""
    pipe = os.open(fifo, os.O_WRONLY)
    os.write(pipe, b"!")
    code = "import os, signal; os.fork() and os._exit(0); os.setsid(); signal.pause()"
    subprocess.Popen(
        [sys.executable, "-c", code], pass_fds=[pipe], start_new_session=True, env=environment or {}
    ).wait()
    os.close(pipe)
    return True


def spin_with_session(response: str, fifo: str) -> bool:
    start_session(response, fifo)
    while True:
        pass


def vanish_with_session(response: str, fifo: str) -> bool:
    start_session(response, fifo)
    os._exit(3)


def start_session_with_environment(response: str, fifo: str) -> bool:
    return start_session(response, fifo, dict(os.environ))
