"""Signals that ask a run to leave: counted in this process, by real signals to its main thread."""

from __future__ import annotations

import signal
import threading

import pytest

from megarl.errors import Stopped
from megarl.runtime.clock import RunningClock
from megarl.runtime.interrupt import SIGNALS, Interrupt, blocked, starting


def send(*numbers: int) -> None:
    """To the main thread: another one, which a library left, could take a signal of the process, and later."""
    for number in numbers:
        signal.pthread_kill(threading.main_thread().ident or 0, number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_acts_once(number: int) -> None:
    acts: list[str] = []
    with Interrupt(lambda: acts.append("act")) as interrupt:
        assert not interrupt.asked
        send(number, signal.SIGTERM, signal.SIGUSR1)
        assert interrupt.asked and acts == ["act"]


def test_a_second_ctrl_c_raises_and_other_signals_never_do() -> None:
    """A scheduler may repeat SIGTERM, and a Ctrl-C after it still asks."""
    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        assert interrupt.asked
        send(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt(), Interrupt():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_inner_interrupt_takes_over_what_was_asked() -> None:
    with Interrupt() as outer:
        send(signal.SIGTERM)
        with Interrupt() as inner:
            assert inner.asked
        assert outer.asked


def test_blocked_signals_wait_for_the_next_interrupt() -> None:
    with Interrupt() as outer:
        with blocked():
            send(signal.SIGUSR1)
            assert not outer.asked
            with Interrupt() as inner:
                assert inner.asked
        assert outer.asked


def test_a_thread_may_enter_and_listens_to_nothing() -> None:
    asked: list[bool] = []

    def enter() -> None:
        with Interrupt() as interrupt:
            asked.append(interrupt.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert asked == [False]


@pytest.mark.parametrize("number", SIGNALS)
def test_starting_turns_the_first_signal_into_stopped(number: int) -> None:
    """Code that catches every Exception cannot hide it."""
    with pytest.raises(Stopped), starting():
        try:
            send(number)
        except Exception:
            pytest.fail("taken for an error")


def test_starting_under_a_launcher_only_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait for this one: it leaves with them."""
    monkeypatch.setenv("RANK", "0")
    with starting():
        send(signal.SIGTERM)
        with Interrupt() as interrupt:
            assert interrupt.asked


def test_the_clock_stands_while_the_process_is_stopped() -> None:
    """A pause longer than the gap counts as the gap; shorter ones count in full."""
    now = [100.0]
    clock = RunningClock(gap=2.0, now=lambda: now[0])
    for seconds in (1.0, 2.0):
        now[0] += seconds
        assert clock() == pytest.approx(now[0] - 100)
        clock.tick()
    now[0] += 3600
    assert clock() == pytest.approx(5.0)
    clock.tick()
    now[0] += 1
    assert clock() == pytest.approx(6.0)
