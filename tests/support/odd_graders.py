"""Grading functions of every temper, named by the answer they are given; imported by worker processes."""

import os
import re
import signal
import subprocess
import sys


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
