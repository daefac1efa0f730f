"""Grader processes: whatever a grading function does, a verdict comes back in time and no process stays behind.

The verdicts of a hung function rest on real clocks: the timeout is far above what the quick calls need, and only the
hung ones wait for it.
"""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from megarl.errors import RunError, UserError
from megarl.rewards.grade import Grade
from megarl.rewards.workers import LONGEST_LINE, Graders

DEADLINE = 60.0  # seconds for what must happen at all


def grade(graders: Graders, *pairs: tuple[str, str]) -> list[Grade]:
    futures = [graders.submit(*pair) for pair in pairs]
    return [future.result(DEADLINE) for future in futures]


@pytest.fixture(scope="module")
def graders() -> Iterator[Graders]:
    with closing(Graders("tests.support.odd_graders:by_answer", workers=2, timeout=3.0)) as graders:
        yield graders


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A named pipe and its reading end, which sees the end of file when the last process that holds it is gone."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield str(path), end
    os.close(end)


def read(end: int) -> bytes:
    ready, _, _ = select.select([end], [], [], DEADLINE)
    assert ready, "nothing came through the pipe in time"
    return os.read(end, 1)


def test_verdicts_are_told_apart(graders):
    """Every way in which a grading function can end has its verdict, in the order asked, with its message kept."""
    cases = [
        ("a", "equal a", "right", 1.0, ""),
        ("spin", "spin", "timeout", 0.0, "no verdict within 3 s"),
        ("a", "equal b", "wrong", 0.0, ""),
        ("", "value 0.5", "right", 0.5, ""),
        ("", "value 0.25", "wrong", 0.25, ""),
        ("", "value -1", "wrong", -1.0, ""),
        ("", "value 'right'", "right", 1.0, ""),
        ("", "value 'timeout'", "timeout", 0.0, ""),
        ("", "throw why", "error", 0.0, "KeyError: 'why'"),
        ("", "leave why", "error", 0.0, "SystemExit: why"),
        ("", "value None", "error", 0.0, "returned None, not a bool"),
        ("", "value nan", "error", 0.0, "returned nan, not a bool"),
        ("", "value 'yes'", "error", 0.0, "returned 'yes', not right, wrong, timeout, error"),
        ("", "vanish", "error", 0.0, "left with status 3, 2 times"),
        ("", "crash", "error", 0.0, "died by SIGSEGV, 2 times"),
        ("", "spin_in_c", "timeout", 0.0, "no verdict within 3 s"),
        ("", "talk", "right", 1.0, ""),
        ("", "value 10 ** 400", "error", 0.0, "not a bool, number or verdict"),
        ("", "unprintable", "error", 0.0, "RuntimeError: no words"),
        ("", "cancel", "error", 0.0, "CancelledError: cancelled"),
        ("", "coroutine", "error", 0.0, "returned <coroutine object coroutine"),
        ("", "fork", "error", 0.0, "the grading function forked, and returned twice"),
        ("", "fork raise", "error", 0.0, "the grading function forked, and returned twice"),
        ("", "pool", "right", 1.0, ""),
        ("", "flood", "error", 0.0, "the grader process wrote what is no grade, 2 times"),
        ("", "write b'no JSON\\n'", "error", 0.0, "the grader process wrote what is no grade, 2 times"),
        ("", "write b'\\xff\\xfe\\n'", "error", 0.0, "wrote what is no grade, 2 times"),
        ("", "write b'[' * 100000 + b'\\n'", "error", 0.0, "wrote what is no grade, 2 times"),
        ("", "write b'{}\\n{}\\n'", "error", 0.0, "the grader process wrote"),
        ("", "trickle", "timeout", 0.0, "no verdict within 3 s"),
    ]
    grades = grade(graders, *[(response, answer) for response, answer, *_ in cases])
    for (_, answer, verdict, score, message), got in zip(cases, grades, strict=True):
        assert (got.verdict, got.score) == (verdict, score), answer
        assert message in got.message, answer


def test_a_message_is_one_short_line(graders):
    """A run's record and a terminal get it: no line breaks, and no more than a thousand characters."""
    (grade_,) = grade(graders, ("", "complain 5000000"))
    assert grade_.message.startswith("ValueError: first second") and len(grade_.message) == 1000
    assert grade_.message.isprintable()


def test_a_grade_left_in_the_socket_reaches_no_other_response():
    """A function writes a grade itself and then returns one. The second is nobody's: the next response gets its own."""
    forged = b'[0, {"verdict": "right", "score": 0.75, "formatted": true, "message": ""}]\n'
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=30.0)) as graders:
        scores = [g.score for g in grade(graders, ("", f"write {forged!r}"), ("", "value 0.25"), ("", "value -3"))]
    assert scores == [0.75, 0.25, -3.0]


def test_a_large_answer_is_read_once(monkeypatch):
    """Reading takes time in proportion to what is sent: a flood is stopped after the longest line, not copied."""
    received = []
    recv = socket.socket.recv

    def counted(self, *arguments):
        piece = recv(self, *arguments)
        received.append(len(piece))
        return piece

    monkeypatch.setattr(socket.socket, "recv", counted)
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=60.0)) as graders:
        assert grade(graders, ("", "flood"))[0].verdict == "error"
    assert sum(received) < 2 * (LONGEST_LINE + 2**17)


def test_a_kill_from_outside_changes_no_grade(graders, tmp_path):
    """A process that dies once is asked again in another; one that dies twice is an error (above)."""
    marker = tmp_path / "killed"
    assert grade(graders, ("", f"killed_once {marker}"))[0].verdict == "right"
    assert marker.exists()


def test_formatted_whatever_the_verdict(graders):
    """The format is judged apart from correctness: also of responses whose grading failed."""
    boxed, late, early = r"\boxed{1}", r"<think></think>\boxed{1}", r"<think>\boxed{1}</think>1"
    answers = ["value 1", "value 0", "throw", "vanish"]
    for text, formatted in [(boxed, True), (late, True), (early, False), ("1", False), (r"\boxed{1", False)]:
        assert [g.formatted for g in grade(graders, *[(text, a) for a in answers])] == [formatted] * 4, text


def test_many_calls_keep_their_order(graders):
    """More calls than workers, responses far larger than a pipe's buffer, twice in a row."""
    sizes = [1, 200_000, 2, 70_000, *range(50)]
    for _ in range(2):
        assert [g.score for g in grade(graders, *[("é" * n, "length") for n in sizes])] == sizes
    assert grade(graders) == []


def test_a_hung_worker_is_replaced():
    """After a timeout, another process answers, and the old one is gone (reaped: its id is unknown)."""
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=1.0)) as graders:
        before, hung, after = grade(graders, ("", "pid"), ("", "spin"), ("", "pid"))
        assert hung.verdict == "timeout"
        assert before.score != after.score
        with pytest.raises(ProcessLookupError):  # not even a zombie
            os.kill(int(before.score), 0)
        # A stopped process does not even read its request.
        os.kill(int(after.score), signal.SIGSTOP)
        stopped, alive = grade(graders, ("x" * 3_000_000, "length"), ("", "equal "))
        assert (stopped.verdict, alive.verdict) == ("timeout", "right")
    with pytest.raises(ProcessLookupError):
        os.kill(int(after.score), 0)


def test_a_hung_workers_children_die_with_it(fifo):
    """A grading function that starts processes of its own leaves none behind when it is killed."""
    path, end = fifo
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=2.0)) as graders:
        assert grade(graders, ("", f"spin_with_child {path}"))[0].verdict == "timeout"
        assert read(end) == b"!"
        assert read(end) == b""


@pytest.mark.parametrize("how", ["spin", "vanish"])
def test_sessions_that_a_grader_started_end_with_it(fifo, how):
    """Not its group, not its session, not its child any more, and without our environment: it ends all the same."""
    path, end = fifo
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=5.0)) as graders:
        verdict = grade(graders, ("", f"{how}_with_session {path}"))[0].verdict
        assert verdict == ("timeout" if how == "spin" else "error")
        assert read(end) == b"!"
        assert (read(end) or read(end)) in (b"", b"!")  # `vanish` is asked twice
        assert grade(graders, ("a", "equal a"))[0].verdict == "right"


def test_sessions_that_a_grader_started_end_when_it_is_closed(fifo):
    path, end = fifo
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=30.0)) as graders:
        assert grade(graders, ("", f"start_session {path}"))[0].verdict == "right"
        assert read(end) == b"!"
    assert read(end) == b""


def test_sessions_end_with_the_parent_of_the_graders(fifo):
    """`kill -9` of the controller, while the grader is idle and what it left goes on."""
    path, end = fifo
    code = f"""
import signal
from megarl.rewards.workers import Graders
graders = Graders("tests.support.odd_graders:by_answer", workers=1, timeout={DEADLINE})
graders.submit("", "start_session {path}").result()
print("graded", flush=True)
signal.pause()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert read(end) == b"!" and parent.stdout.readline() == b"graded\n"
    parent.kill()
    parent.wait(DEADLINE)
    assert read(end) == b""


def test_sessions_end_though_the_grader_was_killed(fifo):
    """`kill -9` of every process of a grader at once: what it started is found by its environment."""
    path, end = fifo
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=30.0)) as graders:
        assert grade(graders, ("", f"start_session_with_environment {path}"))[0].verdict == "right"
        assert read(end) == b"!"
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.ZombieProcess):
                if "megarl.rewards.worker" in process.cmdline():
                    process.kill()
        assert grade(graders, ("a", "equal a"))[0].verdict == "right"
        assert read(end) == b""


def test_workers_die_with_their_parent(fifo):
    """`kill -9` of the controller during a grading call ends the workers, though they cannot notice by themselves."""
    path, end = fifo
    code = f"""
from megarl.rewards.workers import Graders
graders = Graders("tests.support.odd_graders:by_answer", workers=2, timeout={DEADLINE})
for future in [graders.submit("", "spin_alone {path}") for _ in range(2)]:
    future.result()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    assert read(end) + read(end) == b"!!"
    parent.kill()
    parent.wait(DEADLINE)
    assert read(end) == b""


def test_close_breaks_off_what_runs(fifo):
    """Closing during calls ends them with an error that says so, and leaves no process."""
    path, end = fifo
    graders = Graders("tests.support.odd_graders:by_answer", workers=1, timeout=DEADLINE)
    running, waiting = graders.submit("", f"spin_alone {path}"), graders.submit("", "equal ")
    assert read(end) == b"!"
    graders.close()
    with pytest.raises(RunError, match="closed during a call"):
        running.result(DEADLINE)
    with pytest.raises(RunError, match="closed"):
        waiting.result(DEADLINE)
    assert read(end) == b""


def test_cancelled_calls_are_not_begun(fifo):
    """A cancelled call is taken out of the queue: the next call does not wait for it."""
    path, end = fifo
    with closing(Graders("tests.support.odd_graders:by_answer", workers=1, timeout=2.0)) as graders:
        calls = [("", f"spin_alone {path}")] + [("", "spin")] * 100
        doomed = [graders.submit(*call) for call in calls]
        assert read(end) == b"!"
        assert [future.cancel() for future in doomed] == [False] + [True] * 100
        assert grade(graders, ("a", "equal a"))[0].verdict == "right"  # not after 200 s


def test_workers_are_light(graders):
    """A worker does not import torch or numpy: it starts in a fraction of a second."""
    assert [g.verdict for g in grade(graders, *[("", f"imported {m}") for m in ("torch", "numpy", "json")])] == [
        "wrong",
        "wrong",
        "right",
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("odd_graders", "reward.function: 'odd_graders' is not of the form package.module:function"),
        (
            "tests.support.odd_graders:by_anwser",
            r"tests.support.odd_graders has no function 'by_anwser' \(did you mean 'by_answer'\?\)",
        ),
        ("no_such:grade", "reward.function: 'no_such:grade': cannot import no_such: ModuleNotFoundError"),
    ],
)
def test_a_wrong_path_is_refused_at_start(function, message):
    """The setting is named, and the nearest function, before anything is graded."""
    with pytest.raises(UserError, match=message) as error:
        Graders(function, workers=2, timeout=1.0)
    assert "\n" not in str(error.value)


def test_a_process_that_dies_at_start_is_reported():
    """Dying while importing is an error of the run, with its cause, not a hang."""
    with pytest.raises(RunError, match="left with status 1 while it imported tests.rewards.vanishes_at_import:grade"):
        Graders("tests.rewards.vanishes_at_import:grade", workers=2, timeout=1.0)
