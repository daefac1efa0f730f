"""Runs parts one after the other, each in its own process with a time limit. What fails becomes a row."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from megarl.bench.gpu import child
from megarl.bench.gpu.part import Part, Scale
from megarl.errors import printable
from megarl.runtime.spawn import process_context

START_TIMEOUT = 180.0  # seconds for a process to import what it runs
PATIENCE = 3.0  # a part may take so many times its expected seconds
LAST_LINES = 30  # of an error
PRELOAD = (
    "megarl.bench.gpu.child",
    "megarl.bench.common.learners",
    "megarl.bench.common.models",
    "transformers.models.qwen3.modeling_qwen3",
)
GRACE = 5.0  # seconds to write the stacks, and to end

Row = dict[str, Any]
"""`part`, `outcome` (measured, failed, skipped), `seconds`, then `metrics` or `error`."""


class Worker:
    """The process of one part. It imports while the part before it runs, and waits for `outcome`."""

    def __init__(self, part: Part, scale: Scale, scratch: Path) -> None:
        processes = process_context(PRELOAD)
        self.part = part
        self._log = scratch / f"{len(list(scratch.glob('*.log')))}.log"
        self._log.touch()
        self._pipe, theirs = processes.Pipe()
        arguments = (theirs, dict(os.environ), str(self._log), part, scale)  # a fork server's variables may be outdated
        self._process = processes.Process(target=child.main, args=arguments)  # type: ignore[attr-defined]
        self._process.start()
        self._pid: int = self._process.pid  # type: ignore[assignment]  # it has one from now on
        theirs.close()

    def outcome(self, limit: float, left: float) -> Row:
        """Let the part run, for at most `limit` seconds after its imports and `left` in all. The row without a name."""
        begun = time.monotonic()
        until = begun + left
        try:
            self._message(min(START_TIMEOUT, left), "to import what it runs")
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(b"go")
            found = json.loads(self._message(min(limit, until - begun), "to run"))
            row = {"outcome": found.pop("outcome"), "seconds": _since(begun), **found}
        except _NoMessage as e:
            said = self._log.read_bytes().decode(errors="replace")
            row = {"outcome": "failed", "seconds": _since(begun), "error": f"{said}\nthe process {e}"}
        except Exception as e:
            row = {"outcome": "failed", "seconds": _since(begun), "error": f"the process sent no result: {e}"}
        finally:
            self.close()
        return _shortened(row)

    def close(self) -> None:
        """End the process and its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        self._process.kill()  # it may have no group yet
        self._process.join(GRACE)
        self._pipe.close()

    def _message(self, seconds: float, what: str) -> bytes:
        """The process's next message. Raises _NoMessage if it ends or takes longer."""
        ready = wait([self._pipe, self._process.sentinel], max(0.0, seconds))
        if self._pipe in ready:
            with contextlib.suppress(EOFError, OSError):
                return self._pipe.recv_bytes()
        elif not ready:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGABRT)  # it writes its stacks into the log
            self._process.join(GRACE)
            raise _NoMessage(f"took more than {seconds:.0f} s {what}")
        self._process.join(GRACE)
        code = self._process.exitcode
        if code is not None and code < 0:
            raise _NoMessage(f"was ended by {signal.Signals(-code).name}")
        raise _NoMessage(f"ended with code {code}")


class _NoMessage(Exception):
    """Says what the process did instead."""


def run(
    parts: Sequence[Part], scale: Scale, minutes: float, lacking: Callable[[Part], str], patience: float = PATIENCE
) -> Iterator[Row]:
    """The row of each part, as soon as it is known. `lacking`: why this machine cannot run a part, or nothing.

    A part is skipped when fewer than its expected seconds are left of `minutes`.
    """
    until = time.monotonic() + 60 * minutes
    waiting = [part for part in parts if not lacking(part)]
    ahead: list[Worker] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for part in parts:
                left = until - time.monotonic()
                if reason := lacking(part) or _too_long(part, left):
                    yield {"part": part.name, "outcome": "skipped", "seconds": 0.0, "error": reason}
                    continue
                while not ahead or ahead[0].part is not part:
                    if ahead:  # of a part that was skipped meanwhile
                        ahead.pop().close()
                    ahead.append(Worker(part, scale, Path(scratch)))
                worker = ahead.pop()
                later = waiting[waiting.index(part) + 1 :]
                ahead += [Worker(later[0], scale, Path(scratch))] if later else []
                yield {"part": part.name, **worker.outcome(patience * part.seconds, left)}
        finally:
            for worker in ahead:
                worker.close()


def _too_long(part: Part, left: float) -> str:
    return f"needs about {part.seconds:.0f} s, and {max(0.0, left):.0f} s were left" if left < part.seconds else ""


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def _shortened(found: Row) -> Row:
    """The last lines of an error, with nothing in them that controls a terminal."""
    if "error" in found:
        lines = [line for line in printable(found["error"]).splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("Extension modules:")]  # faulthandler's list of them
        found["error"] = "\n".join(line[:300] for line in lines[-LAST_LINES:])
    return found
