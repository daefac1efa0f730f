"""Seconds that this process has run. Time in which it was stopped (Ctrl-Z, SIGSTOP) does not count."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RunningClock:
    """`clock()` is the time in seconds. Call `tick` more often than every `gap` seconds: a longer pause was a stop."""

    def __init__(self, gap: float, now: Callable[[], float] = time.monotonic) -> None:
        self._gap, self._now = gap, now
        self._lock = threading.Lock()
        self._ran, self._before = 0.0, now()

    def __call__(self) -> float:
        with self._lock:
            return self._ran + min(self._now() - self._before, self._gap)

    def tick(self) -> None:
        with self._lock:
            now = self._now()
            self._ran += min(now - self._before, self._gap)
            self._before = now
