"""Ranks end with the process that called `spawn`, and have its environment."""

import os
import select
import signal
import subprocess
import sys

import pytest

from megarl.runtime.spawn import spawn

pytestmark = pytest.mark.slow

TIMEOUT = 120.0  # seconds
RANKS = """
import os, signal, sys
from megarl.runtime.spawn import spawn

def hold(path):
    pipe = os.open(path, os.O_WRONLY)
    os.write(pipe, b"up\\n")
    signal.pause()

if __name__ == "__main__":
    spawn(hold, 2, (sys.argv[1],))
"""


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_process_that_called_spawn(tmp_path, signal_number):
    """Each rank keeps a FIFO open, so the reader sees its end only when all have ended."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    caller = subprocess.Popen([sys.executable, str(script), str(fifo)])
    try:
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        said = b""
        while said != b"up\nup\n":
            more = _read(reader)
            assert more, "a rank ended before its caller"
            said += more
    finally:
        caller.send_signal(signal_number)
        caller.wait(TIMEOUT)
    assert _read(reader) == b""  # every writer is gone
    os.close(reader)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def test_ranks_have_the_environment_of_the_moment(monkeypatch):
    """Not the environment of the first spawn, when the process that forks them was started."""
    name = "MEGARL_TEST_OF_THE_MOMENT"
    assert spawn(variable, 1, (name,), TIMEOUT) == [None]
    monkeypatch.setenv(name, "set")
    assert spawn(variable, 1, (name,), TIMEOUT) == ["set"]
    monkeypatch.delenv(name)
    assert spawn(variable, 1, (name,), TIMEOUT) == [None]


def _read(reader: int) -> bytes:
    ready, _, _ = select.select([reader], [], [], TIMEOUT)
    assert ready, f"the ranks wrote nothing and did not end within {TIMEOUT:g} s"
    return os.read(reader, 100)
