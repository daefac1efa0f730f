"""Grader processes: responses in, grades out, whatever a grading function does."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Any

from megarl.errors import DeadlineExceeded, RunError, UserError
from megarl.rewards.grade import VERDICTS, Grade, failed
from megarl.rewards.processes import TAG, end_descendants, end_tagged

START_DEADLINE = 120.0  # seconds; importing math-verify takes 1–3
ATTEMPTS = 2  # per grade, when its process dies or writes what is no grade
EXIT_PATIENCE = 5.0  # seconds for a process that has hung up to leave with its own status
LONGEST_LINE = 1 << 20  # bytes of one answer; a grade has a few thousand at most


class Garbage(Exception):
    """A grader process sent what is not the answer to its request."""


class Graders:
    """`workers` processes that grade by `function` (`package.module:function`), each call within `timeout` seconds.

    A call that takes longer gets the verdict `timeout`, and its process is killed and replaced. An exception gets the
    verdict `error`, with its message. A process that dies, or sends what is no grade, is replaced and asked once more:
    something else may have killed it (`kill -9`, no memory), or an earlier call may have left something that writes,
    and that must not change a reward. The second time the verdict is `error`.
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
        self._tag = ""
        self._numbers = itertools.count()

    def start(self, again: bool = True) -> None:
        """Start the process and wait until it can grade. Raises UserError when the function cannot be imported.

        `again`: start once more if a signal ends it meanwhile. A kill from outside says nothing about the function.
        """
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if self._closed:
                ours.close()
                raise RunError("the graders are closed")
            self._socket, self._tag = ours, uuid.uuid4().hex
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megarl.rewards.worker", self._function, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=2,
                # What we can import, it can.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), TAG: self._tag},
                start_new_session=True,  # Ctrl-C is for us alone
            )
        try:
            hello = self._receive(time.monotonic() + START_DEADLINE)
        except TimeoutError:
            self.end()
            raise DeadlineExceeded(f"a grader process to import {self._function}", START_DEADLINE) from None
        except OSError:
            code = self.end(EXIT_PATIENCE)
            if again and code < 0:
                self.start(again=False)
                return
            raise RunError(f"a grader process {_death(code)} while it imported {self._function}") from None
        except Garbage as e:
            self.end()
            raise RunError(f"a grader process {e} while it imported {self._function}") from None
        if hello != {"ready": True}:
            self.end()
            raise UserError(str(hello.get("refused", hello)) if isinstance(hello, dict) else str(hello))

    def grade(self, response: str, answer: str) -> Grade:
        """Grade one response, within the timeout once the process is up."""
        for _ in range(ATTEMPTS):
            if self._process is None:
                self.start()
            try:
                return self._ask(response, answer)
            except TimeoutError:
                self.end()
                return failed("timeout", response, f"no verdict within {self._timeout:g} s")
            except Garbage as e:
                self.end()
                fault = str(e)
            except OSError:
                fault = _death(self.end(EXIT_PATIENCE))
            if self._closed:
                raise RunError("the graders were closed during a call")
        return failed("error", response, f"the grader process {fault}, {ATTEMPTS} times")

    def forbid(self) -> None:
        """From another thread: break off what the process does, and never start it again. `end` kills it."""
        with self._lock:
            self._closed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the other end is gone
                    self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, patience: float = 0.0) -> int:
        """End the process and all that it started, and return its exit status. The next call starts another.

        `patience`: seconds in which it may leave by itself.
        """
        with self._lock:
            if self._process is None or self._socket is None:
                return 0
            if patience and not self._closed:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(patience)
            if self._process.poll() is None:
                if end_descendants(self._process.pid):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(EXIT_PATIENCE)  # it sees that, and leaves no zombie
                self._process.kill()
            else:  # it has ended what it started, unless somebody else killed it
                end_tagged(self._tag)
            code = self._process.wait()
            self._socket.close()
            self._process = self._socket = None
            return code

    def _ask(self, response: str, answer: str) -> Grade:
        """The process's answer. Raises TimeoutError, OSError if the process died, or Garbage."""
        assert self._socket is not None
        deadline = time.monotonic() + self._timeout
        if _readable(self._socket):
            raise Garbage("wrote what is no grade")
        number = next(self._numbers)
        self._socket.settimeout(self._timeout)
        self._socket.sendall(json.dumps([number, response, answer]).encode() + b"\n")
        return _grade(self._receive(deadline), number)

    def _receive(self, deadline: float) -> Any:
        """One line of JSON. Raises as `_ask`."""
        assert self._socket is not None
        line = bytearray()
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise ConnectionResetError
            line += piece
            if len(line) > LONGEST_LINE or b"\n" in piece[:-1]:
                raise Garbage("wrote what is no grade")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise Garbage("wrote what is no grade") from None


def _grade(message: Any, number: int) -> Grade:
    """The grade in an answer to request `number`. Raises Garbage."""
    match message:
        case [int(asked), {"verdict": str(verdict), "score": float(score), **rest}]:
            known = asked == number and verdict in VERDICTS and math.isfinite(score)
            match rest:
                case {"formatted": bool(formatted), "message": str(text)} if known:
                    return Grade(verdict, score, formatted, text)  # type: ignore[arg-type]
    raise Garbage("wrote what is no grade")


def _readable(connection: socket.socket) -> bool:
    """Whether something is there to read, the end of the connection apart."""
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _death(code: int) -> str:
    if code >= 0:
        return f"left with status {code}"
    names = {each.value: each.name for each in signal.Signals}
    return f"died by {names.get(-code, f'signal {-code}')}"
