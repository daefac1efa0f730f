"""An event loop in a thread: it serves the engines and continues rollouts while this rank trains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import torch

T = TypeVar("T")

EXIT_TIMEOUT = 10.0  # seconds for running work to be cancelled


class EventLoop:
    """`with EventLoop(device) as loop:`. Leaving cancels running work. Call from one thread, not from the loop's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="event loop", daemon=True)

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work` and return at once."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and return its result. An exception during the wait, such as Ctrl-C, cancels it."""
        return self.wait(self.begin(work))

    def wait(self, begun: Future[T]) -> T:
        """The result of work that `begin` started. An exception during the wait cancels it."""
        try:
            return begun.result()
        except BaseException:
            begun.cancel()
            raise

    def __enter__(self) -> EventLoop:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(TimeoutError):
            self.begin(_cancel_others()).result(EXIT_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(EXIT_TIMEOUT)
        if not self._thread.is_alive():
            self._loop.close()

    def _serve(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own current device
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
