"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to save and leave after the current step. A second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from megarl.errors import Stopped
from megarl.runtime.launched import under_launcher

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _nothing() -> None:
    pass


class Interrupt:
    """`with Interrupt() as interrupt:`. Then `interrupt.asked` is whether the run should stop.

    `act` is called at the first signal. A second Ctrl-C raises KeyboardInterrupt in the main thread. Schedulers may
    send the other signals as often as they like. Signals that were blocked until now are taken. An inner Interrupt
    shares what it and the outer one got. Only the main thread can listen; in another one, this does nothing.
    """

    def __init__(self, act: Callable[[], None] = _nothing) -> None:
        self.asked: bool = _current is not None and _current.asked
        self._act = act
        self._ctrl_c = 0
        self._before: dict[signal.Signals, object] = {}
        self._outer: Interrupt | None = None

    def __enter__(self) -> Interrupt:
        global _current
        self._outer, _current = _current, self
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._ask) for each in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._outer
        if self._outer:
            self._outer.asked |= self.asked
            self._outer._ctrl_c = max(self._outer._ctrl_c, self._ctrl_c)
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._ctrl_c += number == signal.SIGINT
        if self._ctrl_c > 1:
            raise KeyboardInterrupt
        first, self.asked = not self.asked, True
        if first:
            self._act()


_current: Interrupt | None = None


@contextmanager
def starting() -> Iterator[None]:
    """Raise Stopped at the first signal, outside of `Interrupt`s within: no step is going on, so nothing is lost.

    A rank of torchrun or srun only remembers the request. The others wait for it, and all leave together.
    """

    def leave() -> None:
        if not under_launcher():
            raise KeyboardInterrupt  # not Stopped, which an `except Exception` would take for an error

    with Interrupt(leave) as interrupt:
        try:
            yield
        except KeyboardInterrupt:
            if interrupt.asked and interrupt._ctrl_c < 2:
                raise Stopped("stopped while no step was going on") from None
            raise


@contextmanager
def blocked() -> Iterator[None]:
    """Let the signals wait. Processes that start meanwhile inherit this, until they enter an `Interrupt`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
