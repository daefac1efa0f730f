"""The progress of a running job: a live view in a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.live import Live

from megarl.errors import printable
from megarl.run.timeline import PhaseLog
from megarl.runtime.watchdog import doing
from megarl.view.console import console
from megarl.view.live import PHASES, LiveView, line


class RunProgress:
    """The progress of one run. `quiet` on every rank but the controller."""

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self.quiet, self.total = quiet, total
        self.console = console(file=sys.stderr, quiet=quiet)
        self._view = LiveView(total)
        self._view.done = done
        self._live: Live | None = None
        if self.console.is_terminal and not quiet:
            self._live = Live(self._view, console=self.console, refresh_per_second=4, redirect_stdout=False)
            self._live.start()

    def phase(self, name: str) -> None:
        self._view.phase(name)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        self._view.step(step, metrics)
        if not self._live and not self.quiet:
            self.console.print(line(step, self.total, metrics), soft_wrap=True)

    def say(self, message: str) -> None:
        """Print a line above the live view."""
        if not self.quiet:
            self.console.print(printable(message), soft_wrap=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()


class Stopwatch:
    """Measures the seconds in each phase since the last `lap`, and reports phases to the phase log and the watchdog."""

    def __init__(self, progress: RunProgress, log: PhaseLog, timeout: float) -> None:
        """`timeout`: seconds for each collective of a phase."""
        self._progress, self._log, self._timeout = progress, log, timeout
        self._spent: dict[str, float] = {}
        self._began = time.perf_counter()
        self.step = 0  # of the phases

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._progress.phase(phase)
        began = time.perf_counter()
        with self._log.span(phase, self.step), doing(f"{phase} of step {self.step}", self._timeout):
            try:
                yield
            finally:
                self._spent[phase] = self._spent.get(phase, 0.0) + time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """`seconds_<phase>` of every phase, and `seconds_total`. Resets them."""
        now = time.perf_counter()
        seconds = {f"seconds_{phase}": self._spent.get(phase, 0.0) for phase in (*PHASES, *self._spent)}
        seconds["seconds_total"] = now - self._began
        self._spent, self._began = {}, now
        return seconds
