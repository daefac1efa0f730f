"""Grader processes: responses in, grades out, whatever a grading function does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Any

from megarl.errors import DeadlineExceeded, RunError, UserError
from megarl.rewards.grade import Grade, failed

START_DEADLINE = 120.0  # seconds; importing math-verify takes 1–3
ATTEMPTS = 2  # per grade, when its process dies


class Graders:
    """`workers` processes that grade by `function` (`package.module:function`), each call within `timeout` seconds.

    A call that takes longer gets the verdict `timeout`, and its process is killed and replaced. An exception gets the
    verdict `error`, with its message. A process that dies is asked once more: something else may have killed it
    (`kill -9`, no memory), and that must not change a reward. The second time the verdict is `error`.
    Use from any thread; close when done. The constructor returns when the first process is ready. It raises UserError
    when the function cannot be imported.
    """

    def __init__(self, function: str, workers: int, timeout: float) -> None:
        self._jobs: SimpleQueue[tuple[str, str, Future[Grade]] | None] = SimpleQueue()
        self._workers = [_Worker(function, timeout) for _ in range(workers)]
        ready: Future[None] = Future()
        # Each process is owned by one thread: the kernel ties a child to the thread that started it.
        self._threads = [
            threading.Thread(target=self._serve, args=(worker, ready), name=f"grader-{i}", daemon=True)
            for i, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()
        try:
            ready.result()
        except BaseException:
            self.close()
            raise

    def submit(self, response: str, answer: str) -> Future[Grade]:
        """Queue one response text with its reference answer. Returns its grade to come, at once.

        The future raises RunError or UserError when a process cannot be started again. Cancelled before its turn, the
        response is never graded.
        """
        grade: Future[Grade] = Future()
        self._jobs.put((response, answer, grade))
        return grade

    def close(self) -> None:
        """Kill the processes, whatever they are doing."""
        for _ in self._threads:
            self._jobs.put(None)
        for worker in self._workers:
            worker.forbid()
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: _Worker, ready: Future[None]) -> None:
        try:
            worker.start()
            with contextlib.suppress(InvalidStateError):  # another process was the first
                ready.set_result(None)
        except (UserError, RunError) as e:
            with contextlib.suppress(InvalidStateError):
                ready.set_exception(e)
        while job := self._jobs.get():
            response, answer, grade = job
            if not grade.set_running_or_notify_cancel():
                continue
            try:
                grade.set_result(worker.grade(response, answer))
            except Exception as e:
                grade.set_exception(e)
        worker.end()


class _Worker:
    """One process and the socket to it. It is started again whenever it has ended."""

    def __init__(self, function: str, timeout: float) -> None:
        self._function, self._timeout = function, timeout
        self._lock = threading.Lock()  # between close(), called from outside, and start()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, again: bool = True) -> None:
        """Start the process and wait until it can grade. Raises UserError when the function cannot be imported.

        `again`: start once more if a signal ends it meanwhile. A kill from outside says nothing about the function.
        """
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._closed:
                ours.close()
                raise RunError("the graders are closed")
            self._socket = ours
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megarl.rewards.worker", self._function, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=2,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # what we can import, it can
                start_new_session=True,  # its children are killed with it; Ctrl-C is for us alone
            )
        try:
            hello = self._ask(None, START_DEADLINE)
        except (TimeoutError, OSError) as e:
            code = self.end()
            if isinstance(e, TimeoutError):
                raise DeadlineExceeded(f"a grader process to import {self._function}", START_DEADLINE) from None
            if again and code < 0:
                self.start(again=False)
                return
            raise RunError(f"a grader process {_death(code)} while it imported {self._function}") from None
        if "refused" in hello:
            self.end()
            raise UserError(hello["refused"])

    def grade(self, response: str, answer: str) -> Grade:
        """Grade one response, within the timeout once the process is up."""
        for _ in range(ATTEMPTS):
            if self._process is None:
                self.start()
            try:
                return Grade(**self._ask([response, answer], self._timeout))
            except TimeoutError:
                self.end()
                return failed("timeout", response, f"no verdict within {self._timeout:g} s")
            except OSError:
                code = self.end()
                if self._closed:
                    raise RunError("the graders were closed during a call") from None
        return failed("error", response, f"the grader process {_death(code)}, {ATTEMPTS} times")

    def forbid(self) -> None:
        """From another thread: kill the process and never start it again."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill_group(self._process)

    def end(self) -> int:
        """End the process and its children, and return its exit status. The next call starts another."""
        with self._lock:
            if self._process is None or self._socket is None:
                return 0
            _kill_group(self._process)
            code = self._process.wait()
            self._socket.close()
            self._process = None
            return code

    def _ask(self, request: Any, seconds: float) -> dict[str, Any]:
        """Send one line, unless None, and return the answer. Raises TimeoutError, or OSError if the process died."""
        assert self._socket is not None
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        if request is not None:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = b""
        while not line.endswith(b"\n"):
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise ConnectionResetError
            line += piece
        return dict(json.loads(line))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _death(code: int) -> str:
    return f"died by {signal.Signals(-code).name}" if code < 0 else f"left with status {code}"
