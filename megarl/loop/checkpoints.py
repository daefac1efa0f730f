"""A run's checkpoints: every rank's weights and optimizer and the controller's state, in one atomic commit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from megarl.config import Settings
from megarl.learner import checkpoint
from megarl.learner.learner import Learner
from megarl.learner.parallel import World
from megarl.loop.collectives import broadcast
from megarl.run import atomic
from megarl.runtime.watchdog import waiting
from megarl.view.progress import RunProgress


class Saved(Protocol):
    """What rank 0 saves beside the learner."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Checkpoints:
    """Saves and restores. Collective: every rank calls it. `with checkpoints:` ends when all of them are on disk.

    With `checkpoint.asynchronous`, a thread writes a copy of the state while training goes on. These threads use a
    separate process group. The next save waits for the last.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        learner: Learner,
        controller: Saved | None,
        progress: RunProgress,
    ) -> None:
        self.folder = settings.run / "checkpoints"
        self.keep = settings.checkpoint.keep
        self.world, self.learner, self.controller, self.progress = world, learner, controller, progress
        self._aside = world.aside() if settings.checkpoint.asynchronous else None
        self._writing: Future[None] | None = None
        self._step = 0  # of what is being written
        self._warned: set[str] = set()

    def save(self, step: int) -> None:
        """Commit the state after `step`. On failure the new files are removed and the older checkpoints stay.

        An asynchronous save that fails raises in the next call of `save` or `finish`.
        """
        self.finish()
        with self._waiting(step):
            try:
                write = self._begin(step)
            except BaseException:
                self._discard(step)
                raise
            if self._aside is None:
                self._complete(step, write, self.world)
                return
        self._writing, self._step = Future(), step
        job = partial(self._complete, step, write, self._aside)
        threading.Thread(target=_into, args=(self._writing, job), name=f"save of step {step}", daemon=True).start()

    def finish(self) -> None:
        """Wait for the save in progress, if any, and raise what it raised."""
        if self._writing:
            writing, self._writing = self._writing, None
            with self._waiting(self._step):
                writing.result()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    def _waiting(self, step: int) -> AbstractContextManager[None]:
        return waiting(f"the checkpoint of step {step} to be on disk in {self.folder}", self.world.deadline_s)

    def _begin(self, step: int) -> Callable[[], None]:
        """Write the small parts. Return a function that writes the learner's."""
        folder = atomic.partial_of(self.folder, step)
        if self.controller:
            atomic.prepare(self.folder, step)
            with atomic.clear_errors(self.folder):
                (folder / "learner").mkdir()
                self.controller.save(folder)
        self.world.barrier("the checkpoint folder")
        with atomic.clear_errors(self.folder):
            return checkpoint.saving(self.learner, folder / "learner", self._aside)

    def _complete(self, step: int, write: Callable[[], None], world: World) -> None:
        try:
            with atomic.clear_errors(self.folder):
                write()
            world.barrier("every rank's part of the checkpoint")
            if self.controller:
                atomic.commit(self.folder, step, self.keep, self._warn)
        except BaseException:
            self._discard(step)
            raise
        world.barrier("the checkpoint to be committed")

    def _discard(self, step: int) -> None:
        if self.controller:
            atomic.discard(self.folder, step)

    def clear_partial(self) -> None:
        """Remove what interrupted saves left. For the job that has the run to itself."""
        if self.controller:
            atomic.clear_partial(self.folder, self._warn)

    def restore(self) -> int:
        """Load the newest whole checkpoint, which nobody deletes meanwhile. Returns its step, 0 when there is none."""
        reading = atomic.reading(self.folder, self._warn) if self.controller else nullcontext(None)
        with reading as newest:
            step = broadcast(newest, self.world)
            if step is None:
                self.progress.say(f"no checkpoint in {self.folder}: starting from the beginning")
                return 0
            folder = atomic.folder_of(self.folder, step)
            checkpoint.load(self.learner, folder / "learner")
            if self.controller:
                self.controller.load(folder)
            self.world.barrier("the checkpoint to be read")
        self.progress.say(f"resumed after step {step}")
        return step

    def _warn(self, message: str) -> None:
        """Say it once."""
        if message not in self._warned:
            self._warned.add(message)
            self.progress.say(message)


def _into(future: Future[None], work: Callable[[], None]) -> None:
    try:
        work()
    except BaseException as e:
        future.set_exception(e)
    else:
        future.set_result(None)
