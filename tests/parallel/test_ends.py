"""However a run ends, it is named and nothing stays: signals, stopped and killed processes, on ranks that do little.

A rank sends signals to the process that called `spawn`, which is this one, or to the other rank.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.errors import RunError, Stopped
from megarl.runtime.interrupt import Interrupt, starting
from megarl.runtime.rank import Heartbeat
from megarl.runtime.spawn import spawn

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

BOUND = 100.0  # seconds within which everything must have ended, on a busy machine
SHORT = 4.0  # seconds without a pulse


def send(number: int, caller: int, sender: int) -> bool:
    """Rank `sender` signals the caller. Every rank leaves when it is asked to."""
    with Interrupt() as interrupt:
        if int(os.environ["RANK"]) == sender:
            os.kill(caller, number)
        wait_until_asked(interrupt)
    return interrupt.asked


def wait_until_asked(interrupt: Interrupt) -> None:
    pause = threading.Event()
    while not interrupt.asked:
        pause.wait(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_passed_on(number: int) -> None:
    """Proves that every rank is asked to leave, and that its result is returned."""
    before = signal.getsignal(number)
    assert spawn(send, 2, (number, os.getpid(), 1), BOUND, saves=True) == [True, True]
    assert signal.getsignal(number) == before


def leave_late(caller: int) -> bool:
    """Signals come before the rank listens, and after it has stopped to."""
    os.kill(caller, signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)  # and one to this rank alone
    with Interrupt() as interrupt:
        asked = interrupt.asked
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return asked


def test_a_rank_that_does_not_listen_yet_or_any_more_is_not_ended() -> None:
    assert spawn(leave_late, 1, (os.getpid(),), BOUND, saves=True) == [True]


def never_leave(caller: int) -> None:
    with Interrupt() as interrupt:
        os.kill(caller, signal.SIGINT)
        wait_until_asked(interrupt)
        os.kill(caller, signal.SIGINT)
        threading.Event().wait()


def test_a_second_ctrl_c_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        spawn(never_leave, 1, (os.getpid(),), BOUND, saves=True)


def join_while_the_other_leaves() -> None:
    """Rank 1 ends where torch makes groups, out of any named wait."""
    import torch.distributed as dist

    from megarl.runtime.store import connect

    number = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=connect(2), rank=number, world_size=2)
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_a_rank_killed_anywhere_is_the_cause_that_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """Not torch's error on the rank that missed it, whose traceback is not printed either."""
    with pytest.raises(RunError) as failed:
        spawn(join_while_the_other_leaves, 2, (), BOUND)
    assert str(failed.value) == "rank 1 was ended by SIGKILL"
    assert "Traceback" not in capfd.readouterr().err


def hang(how: str, stuck: list[int]) -> None:
    if int(os.environ["RANK"]) in stuck:
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:  # exponential, and keeps the interpreter's lock
            re.match(r"(a+)+$", "a" * 99 + "b")
    threading.Event().wait()


@pytest.mark.parametrize(("how", "stuck"), [("stopped", [0, 1]), ("stopped", [1]), ("stuck", [0, 1])])
def test_ranks_without_a_pulse_are_ended_and_named(tmp_path: Path, how: str, stuck: list[int]) -> None:
    """Also when no rank is left to notice, and with stacks: a stopped rank is continued for them."""
    with pytest.raises(RunError, match=f"no sign of life for .* from rank {stuck[0]} \\({how}") as failed:
        spawn(hang, 2, (how, stuck), BOUND, heartbeat=Heartbeat(SHORT, tmp_path))
    assert f"heartbeat_timeout: {SHORT:g}" in str(failed.value)
    for number in stuck:
        assert f"rank {number} (" in str(failed.value)
        assert "in hang" in (tmp_path / f"stacks_rank_{number}.txt").read_text()


def stop_the_caller(caller: int, number: int) -> None:
    """Stop the caller for longer than the heartbeat."""
    command = [sys.executable, "-c", WAKER, str(caller), str(3 * SHORT)]
    waker = subprocess.Popen(command, start_new_session=True)  # not to be stopped with this rank
    os.kill(caller, number)
    waker.wait()


WAKER = """
import os, signal, sys, time
time.sleep(float(sys.argv[2]))
os.kill(int(sys.argv[1]), signal.SIGCONT)
"""


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP])
def test_a_stopped_launcher_goes_on(tmp_path: Path, number: int) -> None:
    """Ctrl-Z, or SIGSTOP, for three times as long as a silent rank may take: no rank is lost by it."""
    script = tmp_path / "caller.py"
    script.write_text(STOPPED)
    command = [sys.executable, str(script), str(tmp_path), str(int(number))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, env=environment)
    assert done.stdout == "whole\n", done.stderr


def test_ctrl_z_stops_the_ranks_too(tmp_path: Path) -> None:
    """Proves that the ranks are stopped with the launcher, and continued with it."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        ranks = started(caller)
        caller.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(caller.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        wait_for(lambda: {state(pid) for pid in ranks} == {"T"})
        caller.send_signal(signal.SIGCONT)
        wait_for(lambda: "T" not in {state(pid) for pid in ranks})
    finally:
        caller.kill()
        caller.wait()


STOPPED = """
import os, sys
from pathlib import Path
from megarl.runtime.rank import Heartbeat
from megarl.runtime.spawn import PRELOAD, spawn
from tests.parallel.test_ends import SHORT, stop_the_caller

PRELOAD[1:] = ["megarl.runtime.rank"]  # not Megatron, which takes long
if __name__ == "__main__":
    arguments = os.getpid(), int(sys.argv[2])
    spawn(stop_the_caller, 1, arguments, heartbeat=Heartbeat(SHORT, Path(sys.argv[1])))
    print("whole")
"""

RANKS = """
import os, signal
from megarl.runtime.spawn import PRELOAD, spawn

PRELOAD[1:] = ["megarl.runtime.rank"]

def hold():
    print(os.getpid(), flush=True)
    while True:
        signal.pause()

if __name__ == "__main__":
    spawn(hold, 2)
"""


@pytest.mark.parametrize("group", [False, True])
def test_a_stopped_rank_ends_with_a_killed_launcher(tmp_path: Path, group: bool) -> None:
    """SIGSTOP of a rank, then SIGKILL of the launcher or its whole group: the kernel kills ranks and fork server."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        ranks = started(caller)
        os.kill(ranks[1], signal.SIGSTOP)
        family = psutil.Process(caller.pid).children(recursive=True)
        ends = [os.pidfd_open(process.pid) for process in family]
        assert {process.pid for process in family} >= set(ranks)
    finally:
        (os.killpg if group else os.kill)(caller.pid, signal.SIGKILL)
        caller.wait()
    while ends:
        readable, _, _ = select.select(ends, [], [], BOUND)
        assert readable, f"{len(ends)} processes are left"
        ends = [fd for fd in ends if fd not in readable]


def test_a_signal_before_the_ranks_run_raises_stopped() -> None:
    """Proves that `starting` turns the first signal into Stopped, and that code which catches errors cannot hide it."""
    with pytest.raises(Stopped), starting():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")
        spawn(hang, 1, ("", []), BOUND, saves=True)


def place_of_the_store() -> str:
    return os.environ["MEGARL_STORE"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_open_the_store() -> None:
    """Neither read the run's messages nor write a verdict into it."""
    from megarl.runtime.store import LocalStore

    store = LocalStore()
    code = f"import os; os.setuid(65534); open({store.path!r}, 'r+b')"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "PermissionError" in refused.stderr
    with open(store.path, "r+b"):
        store.close()
    assert spawn(place_of_the_store, 1, (), BOUND)[0].startswith(f"/proc/{os.getpid()}/fd/")


def started(caller: subprocess.Popen[str]) -> list[int]:
    assert caller.stdout is not None
    return [int(caller.stdout.readline()) for _ in range(2)]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition: Any) -> None:
    pause = threading.Event()
    for _ in range(int(BOUND / 0.05)):
        if condition():
            return
        pause.wait(0.05)
    pytest.fail(f"did not happen within {BOUND:g} s")
