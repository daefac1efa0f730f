"""Work in the event loop's thread: waited for or not, its errors raised where it is waited for, ended with the loop."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from megarl.errors import RunError
from megarl.runtime.event_loop import EventLoop

CPU = torch.device("cpu")


def test_work_goes_on_beside_the_caller() -> None:
    """Proves that what was begun runs without being waited for, in another thread."""
    ran = threading.Event()

    async def work() -> str:
        ran.set()
        return threading.current_thread().name

    with EventLoop(CPU) as loop:
        begun = loop.begin(work())
        assert ran.wait(30)
        assert loop.wait(begun) == "event loop" != threading.current_thread().name


def test_errors_are_raised_where_the_work_is_waited_for() -> None:
    async def fail() -> None:
        raise RunError("the engine is gone")

    with EventLoop(CPU) as loop:
        begun = loop.begin(fail())
        assert loop.run(asyncio.sleep(0, 7)) == 7
        with pytest.raises(RunError, match="the engine is gone"):
            loop.wait(begun)


def test_leaving_cancels_what_still_runs() -> None:
    ended = threading.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with EventLoop(CPU) as loop:
        loop.begin(forever())
        loop.run(asyncio.sleep(0))
    assert ended.is_set()
    assert "event loop" not in {thread.name for thread in threading.enumerate()}
