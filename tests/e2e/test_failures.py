"""What fails ends the run within its deadline, names the cause, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import runs

from megarl import config
from megarl.errors import RunError
from megarl.learner.spawn import spawn
from megarl.runlock import only_job
from megarl.train import train

pytestmark = [pytest.mark.e2e, pytest.mark.parallel]


@pytest.fixture(autouse=True)
def nothing_left():
    """No process outlives its run: neither ranks nor graders (the fork server stays, for the next run's ranks)."""
    yield
    children = psutil.Process().children()
    ranks = [rank for server in children if "forkserver" in str(server.cmdline()) for rank in server.children()]
    graders = [p for p in psutil.Process().children(recursive=True) if "rewards.worker" in " ".join(p.cmdline())]
    assert not graders and not ranks


def train_with_a_broken_rank(settings: config.Settings) -> None:
    """Rank 1 fails in the first update, while rank 0 waits for it in a collective."""
    from megarl.learner.learner import Learner

    original = Learner.train_step

    def train_step(self: Learner, *arguments: object) -> object:
        if self.world.rank == 1:
            raise ArithmeticError("a bit fell over")
        return original(self, *arguments)

    Learner.train_step = train_step
    train(settings)


def train_with_a_stopped_rank(settings: config.Settings) -> None:
    """Rank 1 hangs in the first update as nothing else does: stopped by SIGSTOP, while rank 0 waits for it."""
    from megarl.learner.learner import Learner

    original = Learner.train_step

    def train_step(self: Learner, *arguments: object) -> object:
        if self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, *arguments)

    Learner.train_step = train_step
    train(settings)


def train_with_a_dying_engine(settings: config.Settings) -> None:
    """The engine's decoder fails in the second step."""
    from megarl.rollout.decoder import Decoder

    original, calls = Decoder.logits, [0]

    def logits(self: Decoder, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] > 20:
            raise MemoryError("no room for the cache")
        return original(self, *arguments)

    Decoder.logits = logits
    train(settings)


def test_a_rank_that_raises_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="rank 1 failed: ArithmeticError: a bit fell over"):
        spawn(train_with_a_broken_rank, 2, (runs.settings(tmp_path / "run", "parallel.tp=2"),), runs.DEADLINE)


def test_a_rank_that_hangs_ends_the_run_and_is_named(tmp_path: Path) -> None:
    """Within heartbeat_deadline, though its collectives may take hours; where rank 0 waited is written down."""
    folder = tmp_path / "run"
    patient = ["parallel.tp=2", "heartbeat_deadline=10", "collective_deadline=20000"]
    last = "(starting|rollout of step 1|train of step 1)"  # its last pulse may be from before the present phase
    with pytest.raises(RunError, match=f"rank 1 has shown no sign of life for .* it was last at {last}"):
        spawn(train_with_a_stopped_rank, 2, (runs.settings(folder, *patient),), runs.DEADLINE)
    assert "learner.py" in (folder / "logs" / "stacks_rank_0.txt").read_text()


def test_an_engine_that_dies_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="local engine.*no room for the cache"):
        spawn(train_with_a_dying_engine, 1, (runs.settings(tmp_path / "run", "parallel.tp=1"),), runs.DEADLINE)


def test_a_grader_that_hangs_is_a_verdict_of_its_own(tmp_path: Path) -> None:
    """Each grade runs into its time limit, its worker is replaced, and the run goes on."""
    metrics = runs.run(
        runs.settings(
            tmp_path / "run", "parallel.tp=1", "steps=1", "reward.function=tests.e2e.graders:hang", "reward.timeout=0.2"
        )
    )
    assert metrics[0]["verdict_timeout"] == 16
    assert metrics[0]["accuracy"] == 0


def test_a_grader_that_always_fails_ends_the_run(tmp_path: Path) -> None:
    settings = runs.settings(tmp_path / "run", "parallel.tp=1", "reward.function=tests.e2e.graders:fail")
    with pytest.raises(RunError, match="every one of 16 grades failed.*the verifier is broken"):
        runs.run(settings)


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    """`megarl train` where another process is at work: one line that names it, exit code 2, nothing written."""
    folder = tmp_path / "run"
    with only_job(folder, print):
        job = subprocess.run(
            [sys.executable, "-m", "megarl.cli", "train", str(runs.QUICKSTART / "train.yaml"), f"run={folder}"]
            + ["parallel.tp=1"],
            capture_output=True,
            text=True,
            timeout=runs.DEADLINE,
        )
        held = [file.name for file in folder.iterdir()]
    refusals = [line for line in job.stderr.splitlines() if line.startswith("megarl: ")]
    assert refusals == [
        f"megarl: run: {folder} is in use by process {os.getpid()} on {socket.gethostname()}; "
        "end it, or name another folder"
    ]
    assert job.returncode == 2
    assert held == [".lock"]
