"""A run's checkpoints: every rank's weights and optimizer, and the controller's state, as one commit."""

from __future__ import annotations

from megarl import commit
from megarl.config import Settings
from megarl.controller import Controller
from megarl.exchange import broadcast
from megarl.learner.learner import Learner
from megarl.learner.parallel import World
from megarl.progress import RunProgress
from megarl.watchdog import waiting


class Checkpoints:
    """Saves and restores; collective, so every rank calls it."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        learner: Learner,
        controller: Controller | None,
        progress: RunProgress,
    ) -> None:
        self.folder = settings.run / "checkpoints"
        self.keep = settings.checkpoint.keep
        self.world, self.learner, self.controller, self.progress = world, learner, controller, progress

    def save(self, step: int) -> None:
        """Commit the state after `step`. On failure what was written is removed and the older checkpoints stay."""
        with waiting(f"the checkpoint of step {step} to be on disk in {self.folder}", self.world.deadline_s):
            self._save(step)

    def _save(self, step: int) -> None:
        partial = commit.partial_of(self.folder, step)
        try:
            if self.controller:
                commit.prepare(self.folder, step)
                with commit.clear_errors(self.folder):
                    (partial / "learner").mkdir()
                    self.controller.save(partial)
            self.world.barrier("the checkpoint folder")
            with commit.clear_errors(self.folder):
                self.learner.save(partial / "learner")
            self.world.barrier("every rank's part of the checkpoint")
            if self.controller:
                commit.commit(self.folder, step, self.keep)
        except BaseException:
            if self.controller:
                commit.discard(self.folder, step)
            raise
        self.world.barrier("the checkpoint to be committed")

    def restore(self) -> int:
        """Load the newest whole checkpoint; the step it was made after, 0 when there is none."""
        step = None
        if self.controller:
            step = commit.newest_good(self.folder, self.progress.say)
        step = broadcast(step, self.world)
        if step is None:
            self.progress.say(f"no checkpoint in {self.folder}: starting from the beginning")
            return 0
        folder = commit.folder_of(self.folder, step)
        self.learner.load(folder / "learner")
        if self.controller:
            self.controller.load(folder)
        self.progress.say(f"resumed after step {step}")
        return step
