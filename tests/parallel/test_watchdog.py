"""A wait that outlives its deadline ends the job: the message names the wait, the rank and where the others are.

Real processes, real gloo; a stopped process is one under SIGSTOP. A lost node is not played here: to the ranks that are
left it looks like a stopped one.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl import config
from megarl.errors import RanksLost, RunError
from megarl.loop.checkpoints import Checkpoints
from megarl.loop.collectives import broadcast
from megarl.run import atomic
from megarl.runtime import watchdog
from megarl.runtime.spawn import spawn
from megarl.view.progress import RunProgress

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

BOUND = 200.0  # seconds within which a failed job must have ended, on a busy machine
LONG, SHORT = 10_000.0, 3.0


def job(logs: Path, collective: float, heartbeat: float, place: str, hang: Any, hanging_rank: int) -> None:
    """On each of two ranks: one waits for the other in a broadcast, which `hang`s, or in a barrier."""
    from megarl.learner.parallel import start

    world = start(config.Parallel(), config.Precision(dtype="fp32"), 0, LONG)
    hasty = replace(world, deadline_s=collective)
    with world.watchdog(heartbeat, logs) as dog, watchdog.doing(f"{place} of step 3", collective):
        if world.rank == hanging_rank:
            with watchdog.doing("save of step 3", collective):
                while b"save" not in dog.store.get(watchdog.pulse_key(world.rank)):
                    pass
                hang()
        elif place == "barrier":
            hasty.barrier("the checkpoint to be committed")
        broadcast("orders", hasty)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_for_ever() -> None:
    threading.Event().wait()


def failure(tmp_path: Path, *arguments: Any) -> str:
    with pytest.raises(RunError) as failed:
        spawn(job, 2, (tmp_path, *arguments), BOUND)
    assert "to finish" not in str(failed.value), "the job did not end by itself"
    return str(failed.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(tmp_path: Path, rank: int) -> None:
    """Whichever it is, while the other waits in a collective that may take hours."""
    message = failure(tmp_path, LONG, SHORT, "train", stop, rank)
    assert message.startswith(f"rank {rank} has shown no sign of life for")
    assert f"heartbeat_timeout: {SHORT:g}" in message
    assert message.endswith("it was last at save of step 3")
    assert "broadcast" in (tmp_path / f"stacks_rank_{1 - rank}.txt").read_text()


@pytest.mark.parametrize("place", ["train", "barrier"])
def test_a_collective_that_takes_too_long_is_named(tmp_path: Path, place: str) -> None:
    """The rank that is late lives: both write their stacks, and the message tells where the late one is."""
    message = failure(tmp_path, SHORT, LONG, place, sleep_for_ever, 1)
    assert message.startswith(f"rank 0: gave up after {SHORT:g} s waiting for")
    assert message.endswith("rank 1 was at save of step 3")
    wait = "the checkpoint to be committed" if place == "barrier" else "a broadcast from rank 0, train of step 3"
    assert wait in message
    assert "sleep_for_ever" in (tmp_path / "stacks_rank_1.txt").read_text()
    assert "broadcast" in (tmp_path / "stacks_rank_0.txt").read_text() or place == "barrier"


def test_a_killed_rank_is_named_not_the_one_that_missed_it(tmp_path: Path) -> None:
    assert failure(tmp_path, LONG, LONG, "train", die, 1) == "rank 1 was ended by SIGKILL"


def save_on_a_dead_disk(run: Path) -> None:
    """A disk that takes every byte and never says that it has them."""
    from megarl.learner import checkpoint
    from megarl.learner.parallel import start

    settings = config.parse({"run": run, "model": {"path": "m"}, "data": {"train": ["t"]}})
    world = replace(start(config.Parallel(), config.Precision(dtype="fp32"), 0, LONG), deadline_s=SHORT)
    checkpoint.saving = lambda learner, folder, aside: lambda: None
    part: Any = SimpleNamespace(save=lambda folder: None)
    os.fsync = lambda file: sleep_for_ever()
    with world.watchdog(LONG, run / "logs"):
        Checkpoints(settings, world, part, part, RunProgress(1, quiet=True)).save(7)


def test_a_disk_that_never_answers_ends_the_job(tmp_path: Path) -> None:
    """No checkpoint appears, and the stacks show the flush that hangs."""
    with pytest.raises(RunError, match="rank 0: gave up after 3 s waiting for the checkpoint of step 7 to be on disk"):
        spawn(save_on_a_dead_disk, 1, (tmp_path,), BOUND)
    assert atomic.steps(tmp_path / "checkpoints") == []
    assert "sleep_for_ever" in (tmp_path / "logs" / "stacks_rank_0.txt").read_text()


def test_other_errors_pass_as_they_are() -> None:
    """Only torch's words for a timeout or a lost peer are translated."""
    dog = watchdog.Watchdog(0, 1, None, LONG, Path("unused"), join=lambda: None)
    with pytest.raises(RuntimeError, match="shape") as error, dog.doing("train of step 1", LONG):
        raise RuntimeError("shape mismatch")
    assert not isinstance(error.value, RunError)
    with pytest.raises(RanksLost, match="train of step 1"), dog.doing("train of step 1", LONG):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")
